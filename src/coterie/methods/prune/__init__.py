"""Which experts of a layer stay. A criterion is one file here; `NEEDS` says what it decides from.

| NEEDS | what the file has |
|---|---|
| `router`, `weights` | `score(layer, generator) -> (E,)`, from router rows alone or from all weights too |
| `stats` | `SUMS`, names in `stats.SUMS`, and `score(*sums) -> (E,)` |
| `base` | `score(layer, base) -> (E,)`, the same layer in an earlier checkpoint |
| `outputs` | `check(sizes, per_group)` and `choose(error, groups, per_group, always) -> kept`, by trying sets |
| `clusters` | stun alone, which clusters experts instead of scoring them (`decide/clusters.py`) |

The highest scores stay. A file may also have `REMOVED`, the default of --removed ("remove" unless it says so);
`SEEDED = True`, where it draws from the generator; `COMPARED = False`, where `compare` has no use for it.
"""

from coterie.methods import Folder

_folder = Folder(__name__)
names, load = _folder.names, _folder.load
