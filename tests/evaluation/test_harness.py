"""The harness's own tasks and its own Hugging Face model, beside ours on the same weights."""

import gzip
import io
import json
import re
import tarfile

import numpy as np
import pytest

from evaluation import harness, inference
from evaluation.harness import HarnessConfig
from evaluation.harness_tasks import local
from evaluation.inference import InferenceConfig

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

PROBLEMS = [
    {"context": f"What is {i} + {i}?", "chain_of_thought": f"{i} + {i}", "answer": str(2 * i)}
    for i in range(500, 512)
]
CHOICES = [
    {"query": f"Question: Which is {word}?", "choices": ["this one", "that"], "gold": i % 2}
    for i, word in enumerate(["big", "small", "red", "green", "old"])
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The layout of the real files, with a few documents each."""
    root = tmp_path_factory.mktemp("data")
    (root / "llm_foundry").mkdir()
    for name, rows in {
        "gsm8k": PROBLEMS,
        "arc_easy": CHOICES,
        "boolq": [row | {"choices": ["no", "yes"]} for row in CHOICES],
        "bigbench_strategy_qa": [CHOICES[0] | {"choices": ["Yes", "No"]}] * 10,
        "lambada_openai": [{"context": "A cat sat on the", "continuation": "mat"}] * 3,
    }.items():
        text = "\n".join(map(json.dumps, rows))
        path = root / "llm_foundry" / f"{name}.jsonl.gz"
        path.write_bytes(gzip.compress(text.encode()))
    return str(root)


def config_of(model, tmp_path, data, tasks, **settings):
    inference = InferenceConfig(str(model), "bytes", 256, 8, compilation_cache=None)
    return HarnessConfig(inference, str(tmp_path / "out"), tasks, data, **settings)


@pytest.mark.parametrize("name", ["winnow_gsm8k", "winnow_boolq_generate"])
@pytest.mark.parametrize(
    ("said", "problem", "boolq"),
    [
        (" 508 + 508 The answer is 1016.", {"stated": 1, "last": 1}, 0),
        (" The answer is $1,016.00, of 7.", {"stated": 1, "last": 0}, 0),
        (" It is 1016", {"stated": 0, "last": 1}, 0),
        (" No. It is not.", {"stated": 0, "last": 0}, 1),
        (" know yes", {"stated": 0, "last": 0}, 0),
        ("", {"stated": 0, "last": 0}, 0),
    ],
)
def test_answers_are_found_in_what_is_said(name, said, problem, boolq, data):
    from lm_eval.api.instance import Instance

    config = HarnessConfig(InferenceConfig("none"), "none", name, data)
    [task] = harness.task_manager(config).load([name])["tasks"].values()
    doc = task.test_docs()[0]
    found = {}
    for filtered in task._filters:
        instance = Instance("generate_until", doc, ("", {}), 0)
        instance.resps = [said]
        filtered.apply([instance])
        answer = instance.filtered_resps[filtered.name]
        found[filtered.name] = task.process_results(doc, [answer])["exact_match"]
    assert found == (problem if name == "winnow_gsm8k" else {"yes-no": boolq})


def test_worked_examples_come_first_and_are_not_evaluated(data):
    config = HarnessConfig(InferenceConfig("none"), "none", "winnow_gsm8k", data)
    [task] = harness.task_manager(config).load(["winnow_gsm8k"])["tasks"].values()
    assert len(task.test_docs()) == len(PROBLEMS) - 8
    task.build_all_requests(rank=0, world_size=1)
    prompt = task.instances[0].args[0]
    assert prompt.count("The answer is") == 8 and prompt.endswith("Q: What is 508 + 508?\nA:")
    assert "Q: What is 500 + 500?\nA: 500 + 500 The answer is 1000.\n\n" in prompt


def test_a_t5_is_evaluated_offline_and_only_once(small_model, data, tmp_path):
    tasks = "winnow_arc_easy, winnow_lambada_text winnow_arc_easy_generate"
    config = config_of(small_model, tmp_path, data, tasks)
    found = harness.evaluate(config)
    assert list(found) == ["winnow_arc_easy", "winnow_lambada_text", "winnow_arc_easy_generate"]
    metrics = found["winnow_lambada_text"]["results"]["winnow_lambada_text"]
    # A random model of 384 ids gives text of bytes about log2(384) bits each.
    assert 6 < metrics["bits_per_byte,none"] < 12
    assert found["winnow_arc_easy"]["n-samples"]["winnow_arc_easy"]["effective"] == len(CHOICES)
    written = (tmp_path / "out" / "result.json").read_bytes()
    assert harness.evaluate(config) == found
    assert (tmp_path / "out" / "result.json").read_bytes() == written
    samples = (tmp_path / "out" / "samples" / "winnow_arc_easy.jsonl").read_text().splitlines()
    assert len(samples) == len(CHOICES)
    # Beside accuracy, the right answers' log-likelihood per character, from the samples.
    rows = [json.loads(line) for line in samples]
    pairs = [
        (row["filtered_resps"][row["target"]][0], row["arguments"][row["target"]]) for row in rows
    ]
    expected = [float(reply) / len(request[1].strip()) for reply, request in pairs]
    measured = found["winnow_arc_easy"]["answer_log_likelihood"]["winnow_arc_easy"]
    assert measured == pytest.approx(sum(expected) / len(expected))
    assert measured < 0
    assert any("acc_norm" in line for line in harness.run(config))
    from pruning.store.manifest import ConfigurationChanged

    with pytest.raises(ConfigurationChanged, match="few_shot"):
        harness.evaluate(config_of(small_model, tmp_path, data, tasks, few_shot=2))


def test_groups_are_evaluated_offline_and_summed_up(small_model, tmp_path):
    """MMLU and BIG-Bench Hard in their published layouts, a document or two of each subject."""
    files = (harness.OWN_TASKS / "mmlu.yaml").read_text()
    with tarfile.open(tmp_path / "mmlu.tar.gz", "w:gz") as tar:
        for name in re.findall(r"::(\S+\.csv)", files):
            rows = "".join(f"Question {i}?,one,two,three,four,B\n" for i in range(5))
            content = (rows if "/dev/" in name else "Which?,one,two,three,four,A\n").encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (tmp_path / "bbh").mkdir()
    for name in re.findall(r"bbh/(\w+)\.json", (harness.OWN_TASKS / "bbh.yaml").read_text()):
        rows = [{"input": f"{name} {i}", "target": "(A)"} for i in range(4)]
        (tmp_path / "bbh" / f"{name}.json").write_text(json.dumps({"examples": rows}))
    names = "winnow_mmlu winnow_mmlu_generate winnow_bbh"
    found = harness.evaluate(config_of(small_model, tmp_path, str(tmp_path), names))
    for name, subjects in (("winnow_mmlu", 57), ("winnow_mmlu_generate", 57), ("winnow_bbh", 27)):
        results = dict(found[name]["results"])
        [metric] = [key for key in results[name] if key.startswith(("acc,", "exact_match,"))]
        whole = results.pop(name)[metric]
        assert len(results) == subjects
        assert whole == pytest.approx(np.mean([one[metric] for one in results.values()]))


@pytest.mark.slow  # the harness's own table of thousands of tasks is read
def test_an_unknown_task_is_named(data):
    config = HarnessConfig(InferenceConfig("none"), "none", "winnow_nothing", data)
    with pytest.raises(harness.HarnessError, match="no task, group or tag 'winnow_nothing'"):
        harness.task_manager(config)


def test_a_file_that_is_not_there_is_named(small_model, data, tmp_path):
    manager = harness.task_manager(config_of(small_model, tmp_path, data, "winnow_piqa"))
    with pytest.raises(FileNotFoundError, match=r"piqa\.jsonl\.gz is not there"):
        manager.load(["winnow_piqa"])


def test_files_of_every_kind(tmp_path):
    xml = (
        "<ProblemSet><Problem><Body>Ann has 7 apples.</Body><Question>How many?</Question>"
        "<Answer>7 (apples)</Answer><Formula>7+0=7</Formula></Problem></ProblemSet>"
    )
    (tmp_path / "a.xml").write_text(xml)
    assert local.read(tmp_path / "a.xml") == [
        {"context": "Ann has 7 apples. How many?", "chain_of_thought": "7+0=7", "answer": "7"}
    ]
    (tmp_path / "b.json").write_text(json.dumps({"canary": "x", "examples": [{"input": "q"}]}))
    assert local.read(tmp_path / "b.json") == [{"input": "q"}]
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        content = b'"a, b",B\n'
        info = tarfile.TarInfo("dev/x.csv")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    rows = local.read(tmp_path / "c.tar.gz::dev/x.csv", ["question", "answer"])
    assert rows == [{"question": "a, b", "answer": "B"}]
    with pytest.raises(FileNotFoundError, match="no member"):
        local.read(tmp_path / "c.tar.gz::dev/y.csv")
    (tmp_path / "d.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(ValueError, match=r"d\.jsonl cannot be read"):
        local.read(tmp_path / "d.jsonl")


def test_the_published_sets_make_tasks(real_data):
    """All of MMLU's subjects, and every set that lies here, by ranking and by generation."""
    names = "winnow_mmlu winnow_arc_challenge winnow_piqa winnow_svamp winnow_strategy_qa"
    config = HarnessConfig(InferenceConfig("none"), "none", names, str(real_data / "eval"))
    tasks = harness.task_manager(config).load(config.names())["tasks"]
    subjects = {name: task for name, task in tasks.items() if name.startswith("winnow_mmlu::")}
    assert len(subjects) == 57
    assert sum(len(task.test_docs()) for task in subjects.values()) == 14_042
    counts = {name: len(task.test_docs()) for name, task in tasks.items() if name not in subjects}
    assert counts == {
        "winnow_arc_challenge": 1_172,
        "winnow_piqa": 1_838,
        "winnow_svamp": 292,
        "winnow_strategy_qa": 2_281,
    }


@pytest.fixture(scope="module")
def twins(tmp_path_factory, t5_vocabulary_file):
    """One decoder-only model, as Winnow's weights and as a Hugging Face directory."""
    for name in ("torch", "transformers", "accelerate"):
        pytest.importorskip(name, reason=f"the harness's own model needs {name}")
    import jax

    from models import weights
    from models.config import DecoderConfig
    from models.model import Model
    from models.weights import huggingface

    config = DecoderConfig(
        vocab_size=32_128,
        d_model=32,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        initializer_range=0.3,
    )
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    root = tmp_path_factory.mktemp("twins")
    weights.save(root / "ours", model, params, t5_vocabulary_file)
    huggingface.save(root / "theirs", model, params)
    (root / "theirs" / "spiece.model").write_bytes(t5_vocabulary_file.read_bytes())
    tokenizer = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    (root / "theirs" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return root


TASKS = ("winnow_arc_easy", "winnow_piqa", "winnow_boolq", "winnow_lambada", "winnow_lambada_text")


def test_the_harness_scores_the_same_weights_the_same(twins, real_data, tmp_path):
    """Real tasks through our model and through the harness's "hf" model: request by request."""
    from lm_eval.evaluator import simple_evaluate

    config = HarnessConfig(
        InferenceConfig(str(twins / "ours"), None, 1024, 8, compilation_cache=None),
        str(tmp_path / "out"),
        TASKS,
        str(real_data / "eval"),
        limit=6,
    )
    ours = harness.evaluate(config)
    theirs = simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(twins / "theirs"),
            "add_bos_token": False,
            "device": "cpu",
            "dtype": "float32",
        },
        batch_size=4,
        tasks=list(TASKS),
        limit=6,
        task_manager=harness.task_manager(config),
        bootstrap_iters=0,
    )
    for name in TASKS:
        for key, value in theirs["results"][name].items():
            if isinstance(value, float) and "stderr" not in key:
                assert ours[name]["results"][name][key] == pytest.approx(value, rel=1e-4), key
        lines = (tmp_path / "out" / "samples" / f"{name}.jsonl").read_text().splitlines()
        for line, expected in zip(lines, theirs["samples"][name], strict=True):
            found = json.loads(line)
            assert found["prompt_hash"] == expected["prompt_hash"]
            for a, b in zip(found["resps"], expected["resps"], strict=True):
                _same(a[0], b[0])


def test_five_worked_examples_of_mmlu_are_scored_the_same(twins, real_data):
    """A subject's real files, five of its dev questions before each: letters, by likelihood."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from evaluation.harness_model import WinnowLM

    asked = InferenceConfig(str(twins / "ours"), None, 1024, 8, compilation_cache=None)
    config = HarnessConfig(asked, "none", "winnow_mmlu", str(real_data / "eval"))
    manager = harness.task_manager(config)
    task = manager.load(config.names())["tasks"]["winnow_mmlu::anatomy"]
    theirs = HFLM(str(twins / "theirs"), add_bos_token=False, device="cpu", dtype="float32")
    found = [
        simple_evaluate(model=model, tasks=[task], limit=4, task_manager=manager, bootstrap_iters=0)
        for model in (WinnowLM(inference.load(asked)), theirs)
    ]
    one, other = (answer["samples"]["winnow_mmlu::anatomy"] for answer in found)
    assert len(one) == len(other) == 4
    for a, b in zip(one, other, strict=True):
        context = a["arguments"][0][0]
        assert context.count("Answer:") == 6 and context.count("Answer: ") == 5
        assert a["prompt_hash"] == b["prompt_hash"] and a["acc"] == b["acc"]
        for ours, hf in zip(a["resps"], b["resps"], strict=True):
            _same(ours[0], hf[0])


def _same(ours, theirs):
    """A log-likelihood, or one with whether it is greedy."""
    ours, theirs = (x if isinstance(x, list | tuple) else [x] for x in (ours, theirs))
    np.testing.assert_allclose(float(ours[0]), float(theirs[0]), rtol=1e-5)
    assert [str(x) for x in ours[1:]] == [str(x) for x in theirs[1:]]
