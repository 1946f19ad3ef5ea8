"""Any seqio task as training data: the same batches as seqio gives, and the same after a resume."""

import subprocess
import sys

import numpy as np
import pytest

from pruning.data.seqio_data import SeqioConfig

seqio = pytest.importorskip("seqio", reason="the seqio extra is not installed")

NAME = "winnow_test_copy"
LENGTHS = {"inputs": 8, "targets": 6}


@pytest.fixture(scope="module", autouse=True)
def task():
    import tensorflow as tf

    def dataset(split, shuffle_files, seed=None):
        del split, shuffle_files, seed
        numbers = tf.data.Dataset.range(10, 60)
        return numbers.map(
            lambda i: {"inputs": tf.cast([i, i, i], tf.int32), "targets": tf.cast([i], tf.int32)}
        )

    feature = seqio.Feature(seqio.PassThroughVocabulary(100, eos_id=1), dtype=tf.int32)
    seqio.TaskRegistry.add(
        NAME,
        source=seqio.FunctionDataSource(dataset, splits=["train"]),
        preprocessors=[seqio.preprocessors.append_eos],
        output_features={"inputs": feature, "targets": feature},
    )
    yield
    seqio.TaskRegistry.remove(NAME)


def config(**changes) -> SeqioConfig:
    return SeqioConfig(**{"mixture_or_task": NAME, "lengths": LENGTHS, "batch_size": 4, **changes})


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_batches_are_seqios_own():
    expected = (
        seqio.get_dataset(
            NAME,
            LENGTHS,
            dataset_split="train",
            shuffle=True,
            feature_converter=seqio.EncDecFeatureConverter(pack=False),
            num_epochs=None,
            seed=5,
        )
        .batch(4)
        .as_numpy_iterator()
    )
    batches = config(seed=5).open()
    for step in range(6):
        assert_equal(batches.batch(step), next(expected))
    assert batches.batch(6)["decoder_loss_weights"].dtype == np.float32


@pytest.mark.parametrize("pack", [False, True])
def test_resuming_at_a_step_gives_its_batch(pack):
    straight = config(pack=pack).open()
    wanted = [straight.batch(step) for step in range(9)]
    resumed = config(pack=pack).open()
    for step in (7, 8, 2, 3):
        assert_equal(resumed.batch(step), wanted[step])
    assert ("encoder_segment_ids" in wanted[0]) == pack


def test_processes_read_different_rows():
    parts = [config(shuffle=False).open(index, 2).batch(0) for index in range(2)]
    assert all(part["encoder_input_tokens"].shape == (2, 8) for part in parts)
    first, second = (set(part["encoder_input_tokens"][:, 0].tolist()) for part in parts)
    assert not first & second


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no seqio task or mixture 'no_such_task'"):
        config(mixture_or_task="no_such_task").open()


def test_the_module_itself_imports_no_tensorflow():
    code = (
        "import sys, pruning.data.seqio_data; assert not {'tensorflow', 'seqio'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
