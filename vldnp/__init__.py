"""VL-DNP: dynamic VLM-guided negative prompting for text-to-image diffusion.

>>> import vldnp
>>> model = vldnp.load("moji-sd")
>>> method = vldnp.VLDNP(vldnp.load_vlm("moji-vlm-l"), concepts="moji", omega=8)
>>> out = vldnp.sample(model, ["a cat at the pirate cove"], method, seeds=[0])

Names are imported when first used. OpenMP's threads spin for a moment only, because one other busy
process would take most of PyTorch's speed; import vldnp before torch, or set both variables.
"""

import os

import lazy_loader

if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") == "PASSIVE":
    # Waking a thread takes longer than a small operation, so threads spin for a microsecond.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "1.0.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
