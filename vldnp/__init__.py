"""VL-DNP: dynamic VLM-guided negative prompting for text-to-image diffusion.

>>> import vldnp
>>> model = vldnp.load("moji-sd")
>>> method = vldnp.VLDNP(vldnp.load_vlm("moji-vlm-l"), concepts="moji", omega=8)
>>> out = vldnp.sample(model, ["a cat at the pirate cove"], method, seeds=[0])

Names are imported when first used, so that `import vldnp` is quick.

OpenMP's threads are told to wait without spinning (`OMP_WAIT_POLICY=PASSIVE`), or one other busy
process takes most of PyTorch's speed. OpenMP reads this when torch is first imported: who imports
torch before vldnp sets it in the shell. A value that is set already stays.
"""

import os
from importlib import import_module

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

_HOMES = {
    "backbone": ["Backbone"],
    "concepts": ["ConceptSet", "load_concepts"],
    "grid": ["Study"],
    "judges": ["CNNJudge", "Judgement", "NudeNetClassifier", "NudeNetJudge", "SafetyChecker"],
    "methods": ["CFG", "Method", "SAFREE", "SLD", "Static", "VLDNP"],
    "profile_grid": ["profile_methods", "profile_study"],
    "profiles": ["Profile", "load_profile"],
    "prompts": ["load_prompts"],
    "sampler": ["Output", "Step", "denoise", "sample"],
    "schedules": ["front_loaded", "uniform"],
    "study": ["run"],
    "summary": ["table"],
    "viewer": ["view"],
    "vlm": ["TransformersVLM"],
    "vlm_server": ["RemoteVLM"],
    "zoo": ["load", "load_clip", "load_judge", "load_vlm"],
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vldnp' has no attribute {name!r}")
    value = getattr(import_module(f"vldnp.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
