"""Scores from stored embeddings: density, clusters and near-duplicates.

passes.py      a function of stored embeddings mapped to columns of a score set
embeddings.py  stored embeddings, shard by shard, tile by tile onto the devices
density.py     density of the neighborhood of a document (RACE sketch)
kmeans.py      clusters; prototypicality is the similarity to the assigned centroid
whiten.py      removal of the directions that all documents share
semdedup.py    near-duplicates within a cluster
"""
