"""What can be told from where documents lie: samplers over stored embeddings.

embeddings.py  stored embeddings, shard by shard, and tile by tile onto the devices
density.py     how crowded a document's neighbourhood is (RACE sketch); keep the lonely ones
kmeans.py      clusters; prototypicality is the similarity to the own centroid
whiten.py      what all documents share, taken away
semdedup.py    near twins within a cluster
"""
