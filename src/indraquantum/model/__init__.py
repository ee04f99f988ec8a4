"""IndraQuantumPhase2: a language model whose tokens are states with magnitude and phase.

The names below are imported when they are first used, because torch and transformers take a second to import. All come
from `modeling`, which registers the model with transformers' Auto classes.
"""

from indraquantum.lazy_names import lazy_names

__all__ = ["IndraQuantumConfig", "IndraQuantumOutput", "IndraQuantumPhase2"]
__getattr__ = lazy_names(__name__, dict.fromkeys(__all__, "modeling"))
