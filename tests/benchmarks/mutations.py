"""Forty changes of the code that a test must notice, one at a time.

    python tests/benchmarks/mutations.py            # all; about twenty minutes
    python tests/benchmarks/mutations.py guidance   # those whose file or words contain this

Each is a sign, an off-by-one or a dropped condition. A changed copy of the working tree is tested
with the tests named; the mutation is caught when they fail. The exit status says whether all were.
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]

# fmt: off
# ruff: noqa: E501
MUTATIONS = [  # file, what is replaced (once), by what, tests
    ("vldnp/guidance.py", "- omega * (pred_neg", "+ omega * (pred_neg", "method/test_guidance.py"),
    ("vldnp/guidance.py", "cfg(pred_neg, pred_cond", "cfg(pred_cond, pred_neg", "method/test_guidance.py"),
    ("vldnp/guidance.py", "(pred_cond - pred_neg)", "(pred_cond + pred_neg)", "method/test_guidance.py"),
    ("vldnp/guidance.py", "return vector - torch", "return vector + torch", "method/test_guidance.py"),
    ("vldnp/guider.py", "!= 1 or row in steered", "!= 1", "method/test_levers.py baselines/test_nag.py method/test_identical.py"),
    ("vldnp/guider.py", " and self.omega(i) != 0]", "]", "method/test_sampler.py"),
    ("vldnp/guider.py", 'for name in ("uncond", "late")', 'for name in ("uncond",)', "method/test_levers.py"),
    ("vldnp/guider.py", "i / self.N,", "(i + 1) / self.N,", "method/test_methods.py"),
    ("vldnp/sampler.py", "({} if queried else own.negative(i))", "own.negative(i)", "method/test_sampler.py"),
    ("vldnp/sampler.py", "preds | evaluate(run, latents, t, late)", "preds", "method/test_sampler.py"),
    ("vldnp/sampler.py", "[start : start + size]", "[start : start + size - 1]", "method/test_sampler.py"),
    ("vldnp/batch.py", "range(B) if seeds is None", "range(1, B + 1) if seeds is None", "method/test_sampler.py"),
    ("vldnp/trace.py", "new is not old", "new != old", "method/test_sampler.py method/test_levers.py"),
    ("vldnp/schedules.py", "steps[k - 1] + 1)", "steps[k - 1])", "method/test_schedules.py"),
    ("vldnp/schedules.py", "(2 * k + 1) * N", "(2 * k) * N", "method/test_schedules.py"),
    ("vldnp/answers.py", "None in found and len(found) > 1", "False", "method/test_concepts.py"),
    ("vldnp/answers.py", "if not text:", "if False:", "method/test_concepts.py method/test_negatives.py"),
    ("vldnp/concepts.py", "if terms else None", "", "method/test_concepts.py"),
    ("vldnp/negatives.py", "if since < longest", "if since <= longest", "method/test_negatives.py"),
    ("vldnp/negatives.py", 'if self.on_failure == "raise":', "if False:", "method/test_negatives.py"),
    ("vldnp/negatives.py", "prompt=static, answer=answer", "answer=answer", "method/test_negatives.py"),
    ("vldnp/levers.py", "start <= i / self.N < stop", "start <= i / self.N <= stop", "method/test_levers.py"),
    ("vldnp/baselines/sld.py", "apart < threshold", "apart > threshold", "method/test_guidance.py"),
    ("vldnp/baselines/safree.py", "return ~(distances <", "return (distances <", "baselines/test_safree.py"),
]
