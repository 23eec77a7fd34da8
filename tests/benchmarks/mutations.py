"""Forty changes of the code that a test must notice, one at a time.

    python tests/benchmarks/mutations.py            # all; about twenty minutes
    python tests/benchmarks/mutations.py guidance   # those whose file or words contain this

Each is a sign, an off-by-one or a dropped condition. A changed copy of the working tree is tested
with the tests named; the mutation is caught when they fail. The exit status says whether all were.
"""

import os
import shutil
import subprocess
import sys
import tempfile
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
    ("vldnp/guider.py", "i / self.run.num", "(i + 1) / self.run.num", "method/test_methods.py method/test_guidance.py"),
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
    ("vldnp/baselines/sld.py", "apart < self.threshold", "apart > self.threshold", "parity"),
    ("vldnp/baselines/safree.py", "return ~(distances <", "return (distances <", "baselines/test_safree.py"),
    ("vldnp/study/run.py", "if missing & {*batch[1]", "if missing >= {*batch[1]", "study/test_run.py"),
    ("vldnp/study/run.py", "if key in missing:", "if key not in missing:", "study/test_run.py"),
    ("vldnp/study/run.py", "before[name] != config.get(name)", "False", "study/test_run.py"),
    ("vldnp/study/run.py", '"place": i,', '"place": i + 1,', "study/test_run.py study/test_published.py"),
    ("vldnp/study/folder.py", 'value if value.pop("sha256") == digest(value) else None', 'value.pop("sha256") and value', "study/test_run.py faults"),
    ("vldnp/study/folder.py", ' if record["pixels"] == pixels_digest(image) else None', "", "study/test_run.py faults"),
    ("vldnp/study/grid.py", 'if key != "name"', 'if key not in ("name", "omega")', "study/test_run.py study/test_published.py"),
    ("vldnp/study/grid.py", "prompts[\"seed\"] += prompts.groupby(level=0).cumcount()", "pass", "study/test_run.py"),
    ("vldnp/study/workers.py", "if died == ATTEMPTS:", "if died > ATTEMPTS:", "study/test_workers.py faults"),
    ("vldnp/study/published.py", " if len(rows) == len(wanted) else None", "", "study/test_published.py"),
    ("vldnp/study/grid.py", 'weights.get(head["setting"], "")', '""', "study/test_live.py"),
    ("vldnp/study/published.py", "if batch_key(own) == key", "", "study/test_published.py study/test_verify.py"),
    ("vldnp/models/judges.py", "p >= threshold)", "p > threshold)", "models/test_judges.py"),
    ("vldnp/models/judges.py", "not 0 <= p <= 1", "not p <= 1", "models/test_judges.py metrics/test_finite_scores.py"),
    ("vldnp/metrics/intervals.py", "np.abs(gap) - 0.5", "np.abs(gap) + 0.5", "metrics/test_intervals.py"),
    ("vldnp/metrics/hypotheses.py", "min(2 * p, 1.0)", "min(p, 1.0)", "metrics/test_hypotheses.py"),
]


def caught(file: str, old: str, new: str, tests: str, copy: Path) -> bool | None:
    """Whether the tests notice the change; None where the text is not there exactly once."""
    source = (ROOT / file).read_text(encoding="utf-8")
    if source.count(old) != 1:
        return None
    (copy / file).write_text(source.replace(old, new), encoding="utf-8")
    paths = [f"tests/{name}" for name in tests.split()]
    command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", "-m", "not ray", *paths]
    run = subprocess.run(command, cwd=copy, capture_output=True, env=os.environ | {"PYTHONPATH": str(copy)})
    (copy / file).write_text(source, encoding="utf-8")
    return run.returncode == 1


def main() -> int:
    chosen = [one for one in MUTATIONS if all(word in " ".join(one) for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder:
        copy, missed = Path(folder) / "copy", 0
        left_out = shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", "results")
        shutil.copytree(ROOT, copy, ignore=left_out, symlinks=True)
        shutil.copytree(ROOT / "data" / "results", copy / "data" / "results")
        for file, old, new, tests in chosen:
            said = {True: "caught", False: "MISSED", None: "not applicable"}
            found = caught(file, old, new, tests, copy)
            missed += found is not True
            print(f"{said[found]:14} {file}: {old} → {new}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
