"""Which experts of a MoE layer stay always on, with which constant gates, and which layers become dense.

A condensed layer computes c S(x) + sum_i w_i E_i(x) for every token alike: S the shared expert, E_i a few routed ones.
`official.py` chooses as CD-MoE was published, `least_squares.py` from the Gram matrix of the experts' outputs,
`routing.py` by what the router prefers; `layers.py` searches the layers. Axes: E expert, T token, D hidden.
"""

SELECT = ("least-squares", "official", "routing")
LAYER_SEARCH = ("greedy", "one-shot", "beam")
