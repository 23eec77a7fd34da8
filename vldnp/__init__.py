"""VL-DNP: dynamic VLM-guided negative prompting for text-to-image diffusion.

>>> import vldnp
>>> model = vldnp.load("moji-sd")
>>> method = vldnp.VLDNP(vldnp.load_vlm("moji-vlm-l"), concepts="moji", omega=8)
>>> out = vldnp.sample(model, ["a cat at the pirate cove"], method, seeds=[0])

Names are imported when first used, so that `import vldnp` is quick. OpenMP's threads are told to
spin for a moment only, or one other busy process takes most of PyTorch's speed; where torch is
imported before vldnp, set the two variables below in the shell.
"""

import os

import lazy_loader

if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") == "PASSIVE":
    # Alone, threads that never spin have to be woken up at every operation, which takes longer
    # than many of a small network's operations do; a microsecond of it is enough.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
