import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import linalg
from scipy.stats import beta

from moji.judge import CNNJudge
from vldnp.metrics.fid import Inception, features, fid
from vldnp.metrics.intervals import interval, paired_difference
from vldnp.models import load
from vldnp.models.clip import CLIPScore


def test_interval_agrees_with_a_plain_percentile_bootstrap():
    values = np.array([0, 0, 1, 1, 1, 0, 1, 0, 0, 1] * 4)
    rng = np.random.default_rng(0)
    means = [rng.choice(values, len(values)).mean() for _ in range(4000)]
    low, high = np.quantile(means, [0.025, 0.975])
    found = interval(values)
    assert found.low == pytest.approx(low, abs=0.03)
    assert found.high == pytest.approx(high, abs=0.03)


def test_images_of_a_prompt_are_drawn_together():
    # Four copies of every prompt's value say no more than one copy of it.
    values = np.random.default_rng(2).random(30)
    once = interval(values)
    together = interval(np.repeat(values, 4), np.repeat(np.arange(30), 4))
    apart = interval(np.repeat(values, 4))
    assert together == pytest.approx(once)
    assert apart.high - apart.low < 0.7 * (once.high - once.low)


@pytest.mark.parametrize("rate", [0, 1])
def test_constant_rates_get_the_exact_binomial_interval(rate):
    found = interval([rate] * 60)
    bound = beta.ppf(0.975, 1, 60)  # Clopper–Pearson for 0 of 60
    expected = (0, bound) if rate == 0 else (1 - bound, 1)
    assert found.value == rate
    assert (found.low, found.high) == pytest.approx(expected)


def test_degenerate_samples_have_no_nan_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert interval([0.3] * 5) == (0.3, 0.3, 0.3)
        assert interval([0.3]) == (0.3, 0.3, 0.3)
        assert np.isfinite(interval([0] * 49 + [1])).all()
        assert np.isfinite(interval([0, 1])).all()


def test_missing_values_are_left_out():
    assert interval([1.0, np.nan, 3.0], ["a", "b", "c"]).value == 2
    assert np.isnan(interval([np.nan])).all()
    assert np.isnan(interval([])).all()


def frame(values, prompts=None):
    prompts = [f"p{i}" for i in range(len(values))] if prompts is None else prompts
    return pd.DataFrame({"prompt_set": "s", "prompt_id": prompts, "seed": 0, "score": values})


def test_paired_difference_is_tighter_than_two_intervals():
    easy = np.random.default_rng(4).random(50)
    first, second = frame(easy + 0.1), frame(easy).sample(frac=1, random_state=0)
    assert paired_difference(first, second, "score") == pytest.approx((0.1, 0.1, 0.1))
    noisy = easy + 0.1 + np.random.default_rng(5).normal(0, 0.01, 50)
    by_hand = paired_difference(frame([True, True, False]), frame([False, True, False]), "score")
    assert by_hand.value == pytest.approx(1 / 3)
    found = paired_difference(frame(noisy), second, "score")
    assert found.low > 0 and found.high - found.low < 0.02


def test_pairs_that_never_differ():
    exact = beta.ppf(0.975, 1, 60)  # Clopper–Pearson for 0 of 60
    same = paired_difference(frame([True, False] * 30), frame([True, False] * 30), "score")
    assert same.low == pytest.approx(-same.high), "60 equal pairs are not certainty"
    assert exact < same.high < exact + 0.02
    never, always = frame([False] * 60), frame([True] * 60)
    apart = paired_difference(never, always, "score")
    assert apart[:2] == (-1, -1) and exact - 1 < apart.high < 0
    scores = frame([0.2, 0.3, 0.4])
    assert paired_difference(scores, scores, "score") == (0, 0, 0), "the images are the same"


def test_unpaired_frames_are_refused():
    with pytest.raises(ValueError, match="there are none"):
        paired_difference(frame([1.0]), frame([1.0], ["other"]), "score")
    with pytest.raises(ValueError, match="one row per prompt and seed"):
        paired_difference(frame([1.0, 2.0], ["a", "a"]), frame([1.0]), "score")


class GaussianJudge:
    """A judge whose features are Gaussian numbers hidden in the pixels."""

    def features(self, pixels):
        return (pixels.float() / 255 - 0.5).flatten(1)[:, :6] * 4


def gaussian_images(count, shift, seed):
    noise = np.random.default_rng(seed).normal(0.5 + shift, 0.12, (count, 3, 4, 4))
    return torch.from_numpy((noise.clip(0, 1) * 255).round()).to(torch.uint8)


def closed_form_fid(x, y):
    """Heusel et al. 2017, eq. 6, with a matrix square root instead of eigenvalues."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(a @ b).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)


def test_fid_against_a_second_implementation():
    first, second = gaussian_images(130, 0, 0), gaussian_images(60, 0.1, 1)
    judge = GaussianJudge()
    x, y = (features(images, judge) for images in (first, second))
    assert x.dtype == torch.float64 and x.shape == (130, 6)
    np.testing.assert_allclose(x, judge.features(first), atol=1e-6)
    assert fid(x, y) == pytest.approx(closed_form_fid(x.numpy(), y.numpy()), rel=1e-6)
    assert fid(x, x) == pytest.approx(0, abs=1e-6)


def test_features_of_pil_images_by_the_moji_judge():
    images = [Image.fromarray(np.full((64, 64, 3), i * 20, np.uint8)) for i in range(4)]
    found = features(images, CNNJudge(("cat", "dagger"), ("dagger",)))
    assert fid(found, found) == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="at least two images"):
        fid(found[:1], found)


def test_inception_resizes_as_torch_fidelity_or_by_another_name():
    """Against the network's own input after its first step, for images of several sizes."""
    sizes, shown = [(20, 30), (64, 40)], []

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, pixels):
            shown.append(pixels)
            return (pixels.double().mean((2, 3)),)

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    own, other = Inception(Network()), Inception(Network(), resize="bicubic")
    means = np.stack([np.asarray(image).mean((0, 1)) for image in images])
    np.testing.assert_allclose(features(images, own), means)
    assert [tuple(x.shape[2:]) for x in shown] == [(30, 20), (40, 64)], "resized by the network"
    np.testing.assert_allclose(features(images, other), means, atol=3)
    assert all(x.shape == (1, 3, 299, 299) and x.dtype == torch.uint8 for x in shown[2:])
    assert (own.name, other.name) == ("inception-v3, torch-fidelity", "inception-v3, bicubic")
    assert torch.equal(own.features(torch.ones(2, 3, 8, 8)), torch.full((2, 3), 255.0))
    with pytest.raises(ValueError, match="unknown resize 'bilinear'"):
        Inception(Network(), resize="bilinear")


def test_clip_score_is_the_cosine_of_each_pair(clip_folder):
    clip = CLIPScore.from_pretrained(clip_folder)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(3)]
    prompts = ["a cat", "a dagger at the cove", "two pizzas"]
    pixels = torch.stack([clip.preprocess(image) for image in images])
    with torch.no_grad():
        expected = torch.cosine_similarity(
            clip.model.encode_image(pixels), clip.model.encode_text(clip.tokenizer(prompts))
        )
    np.testing.assert_allclose(clip(images, prompts), expected.numpy(), atol=1e-6)
    clip.batch_size = 2
    np.testing.assert_allclose(clip(images, prompts), expected.numpy(), atol=1e-6)
    assert clip.name == "tiny-clip" and len(clip.revision) == 12
    with pytest.raises(ValueError, match="3 images but 1 prompts"):
        clip(images, prompts[:1])


def test_clip_folder_without_its_parts_is_named(tmp_path, clip_folder):
    with pytest.raises(FileNotFoundError, match="open_clip_config.json is missing"):
        load.load_clip(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="safetensors is missing"):
        load.load_clip(tmp_path)
    weights = (clip_folder / "open_clip_model.safetensors").read_bytes()
    (tmp_path / "open_clip_model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ValueError, match="open_clip_model.safetensors is truncated"):
        load.load_clip(tmp_path)


def test_what_a_clip_does_not_read_is_said_once(clip_folder):
    clip = CLIPScore.from_pretrained(clip_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip.embed_texts(["a cat", "a " * 14])  # with both marks, the limit of 16
    with pytest.warns(UserWarning, match="ignore the tokens of a text after the first 16"):
        clip.embed_texts(["a cat", "b " * 15, "a " * 20])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip.embed_texts(["b " * 15])
