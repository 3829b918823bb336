"""LLaVA in JAX: the library that training, inference and conversion share.

Letters in the names of arrays, one per axis (`features_BRD` is rows x feature rows x width):

    B rows of a batch      S sequence positions     T tiles of a row       P patches of a tile
    R rows of the feature table (T * P, and one newline row where the model has one)
    D decoder width        C vision width           V vocabulary           F feed-forward width
    H query heads          K key/value heads        G query heads per key/value head
    N width of one head    L layers                 M cache positions      Q queried positions
    A rows of a prefill, each for its own slot
"""

__version__ = "0.2.0.dev0"
