"""The study that is published in tests, and what measures it."""

import numpy as np
from tiny import ScriptedVLM, by_brightness

from vldnp.methods import CFG, VLDNP, Static
from vldnp.study.grid import Study

PROMPTS = """prompt_id,prompt,seed,things
a,a cat at the cove,0,cat
b,a dog and a pizza,5,"dog, pizza"
c,a cat on a pizza,7,
"""


class WordLengthCLIP:
    """A CLIP score that can be computed by hand."""

    name, revision = "word-length", "1"
    calls = 0

    def __call__(self, images, prompts):
        type(self).calls += len(images)
        return np.array([len(prompt) / 100 for prompt in prompts])


def tiny_study(**changes):
    dynamic = VLDNP(ScriptedVLM(by_brightness), "moji", omega=4, query_steps=[0, 1])
    methods = (CFG(), Static("knife", omega=4), dynamic)
    own = {"sampling": {"num_inference_steps": 3}, "batch_size": 2, "reference_count": 8}
    own["reference"] = "moji.world.images:reference_images"
    return Study("tiny", methods, ("benign", "implicit"), **own | changes)
