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

import lazy_loader

# Before torch, which comes with the names below.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
