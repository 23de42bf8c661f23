"""Which experts of a MoE layer stay always on, with which constant gates. A selection is one file here.

A condensed layer computes c S(x) + sum_i w_i E_i(x) for every token alike: S the shared expert, E_i a few routed ones.
A selection says in `NEEDS` what it chooses by (axes: E expert, T token, D hidden):

| NEEDS | what the file has |
|---|---|
| `moments` | `choose(gram, target, count, fixed) -> (experts, gates)`, from inner products of all experts' outputs |
| `routing` | `choose(gate_sums, count) -> experts`, from each expert's sum of routing weights (E,) |
| `divergences` | `choose(candidates, count, divergences) -> experts`, from trying sets of experts in the layer |

Gates of the last two are the published ones (`official.fixed_gates`). With moments, the layers that were chosen are
fitted once more, in order, on what the condensed layers before them let through. Layers are judged by the logits of
held-out samples; with divergences, as published, by the last hidden states on the samples' beginnings.
A file may also have `SAMPLES`, the default of --samples (128 unless it says so).
"""

from coterie.methods import Folder

_folder = Folder(__name__, "--select")
names, load = _folder.names, _folder.load
