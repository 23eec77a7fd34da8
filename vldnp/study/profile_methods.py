"""The methods that a profile compares, and studies of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vldnp.baselines.methods import CASG, SAFREE, SLD, Repelled, Summed
from vldnp.baselines.nag import NAG
from vldnp.baselines.safe_denoiser import latents_of
from vldnp.baselines.sld import SLD_STRENGTHS
from vldnp.guidance import rule
from vldnp.methods import CFG, VLDNP, Method, Static
from vldnp.models import load
from vldnp.schedules import SCHEDULES
from vldnp.study.grid import Study
from vldnp.study.profile import BASELINES, Profile, load_profile, numbers
from vldnp.study.reference import unsafe_pictures

COMPARED = ("cfg", "static", "vl-dnp")


def profile_methods(
    profile: str | Path | Profile,
    omegas: Sequence[float] = (),
    queries: int = 0,
    names: Sequence[str] | None = COMPARED,
) -> tuple[Method, ...]:
    """The methods that a profile compares, each at every strength it has.

    Args:
        profile: a name, a YAML file or a `Profile`; it gives the VLM, the concepts, the settings
            of the baselines, and the strengths and number of queries that are not given here.
        omegas: strengths, as `numbers` reads them; none given means the profile's, and for each
            method the one that was chosen for it besides.
        queries: how often VL-DNP asks; 0 means the profile's.
        names: which of `cfg`, `static`, `vl-dnp`, `safree`, `sld` and `BASELINES`; None is all that
            the profile has.
    """
    profile = profile if isinstance(profile, Profile) else load_profile(profile)
    given = [float(omega) for omega in numbers(omegas, "omegas")]

    def strengths(name: str) -> list[float]:
        own = {profile.chosen[name]} if name in profile.chosen else set()
        return given or sorted(map(float, {*profile.omegas, *own}))

    names = ("cfg", "static", "vl-dnp", "safree", "sld", *BASELINES) if names is None else names
    methods: list[Method] = []
    if "cfg" in names:
        methods.append(CFG())
    if "static" in names:
        some = strengths("static")[: None if rule(profile.static_rule).uses_omega else 1]
        methods += [Static(profile.static_prompt, w, profile.static_rule) for w in some]
        methods += [
            replace(Static(**options), name=name)
            for name, options in profile.static_variants.items()
        ]
    if "vl-dnp" in names:
        vlm = load.load_vlm(profile.vlm)
        some = strengths("vl-dnp")
        methods += [dynamic(profile, omega, vlm=vlm, queries=queries) for omega in some]
    if "safree" in names and profile.safree is not None:
        methods += [SAFREE(**options) for options in profile.safree_settings(strengths("safree"))]
        methods += [
            replace(SAFREE(**profile.safree | changes), name=name)
            for name, changes in profile.safree_variants.items()
        ]
    if "sld" in names and profile.sld_prompt is not None:
        methods += [
            SLD(profile.sld_prompt, strength, **profile.sld_options)
            for strength in profile.sld_strengths
        ]
    methods += [
        baseline(profile, name, options)
        for name, options in profile.baselines.items()
        if name in names
    ]
    return tuple(methods)


def baseline(profile: Profile, name: str, options: Mapping) -> Method:
    """One of `BASELINES`.

    Args:
        profile: gives Safe Denoiser's bank of unsafe pictures, and the model for their latents.
        name: of it.
        options: of its constructor in `vldnp.baselines.methods`, of `Static` for Perp-Neg and NAG
            (with NAG's `tau` and `alpha`); CASG's rule may be `sld-medium`, ….
    """
    options = dict(options)
    if name == "safe-denoiser":
        pictures = unsafe_pictures(profile.bank)
        return Repelled(latents_of(load.load(profile.model), pictures), **options)
    if name == "perp-neg":
        return replace(Static(rule="perp-neg", **options), name=name)
    if name == "nag":
        rule = NAG(**{own: options.pop(own) for own in ("tau", "alpha") if own in options})
        return replace(Static(rule=rule, **options), name=name)
    if name == "casg" and str(options.get("rule")).startswith("sld-"):
        options["rule"] = SLD_STRENGTHS[options["rule"].removeprefix("sld-")]
    return {"summed": Summed, "casg": CASG}[name](**options)


def dynamic(profile: Profile, omega: float | None = None, **changes) -> Method:
    """The profile's VL-DNP.

    Args:
        profile: gives all that is not given here.
        omega: default is the strength that was chosen on the tuning prompts.
        changes: `vlm` (a name or a VLM), `queries`, `schedule` (a name in `SCHEDULES`), and the
            further arguments of `vldnp.VLDNP`, of which `preview` may be a name.
    """
    vlm = load.load_vlm(changes.pop("vlm", profile.vlm))
    queries = changes.pop("queries", 0) or profile.queries
    schedule = SCHEDULES[changes.pop("schedule", profile.schedule)](queries)
    omega = profile.chosen_omega("vl-dnp") if omega is None else omega
    options = {"query_steps": schedule} | changes
    if options.get("preview") is not None:
        options["preview"] = load.load_preview(options["preview"])
    return VLDNP(vlm, profile.concepts, omega, **options)


def chosen(profile: Profile, methods: tuple[Method, ...]) -> dict[str, Method]:
    """Method name → the one setting of it that was chosen on the tuning prompts.

    A method whose chosen strength is not among `methods` enters with the nearest; one without a
    chosen strength with the setting that has none, if there is one.
    """
    found: dict[str, Method] = {}
    for name in dict.fromkeys(method.name for method in methods):
        settings = [method for method in methods if method.name == name]
        without = [method for method in settings if method.omega is None]
        if without and name not in profile.chosen:
            found[name] = without[0]
            continue
        omega = profile.chosen_omega(name)
        swept = [method for method in settings if method.omega is not None] or without
        found[name] = min(swept, key=lambda method: abs((method.omega or 0) - omega))
    return found


def profile_study(
    profile: str | Path | Profile,
    omegas: Sequence[float] = (),
    queries: int = 0,
    max_prompts: int = 0,
) -> Study:
    """The grid of a profile: all its methods on all its prompt sets.

    Args:
        profile, omegas, queries: as in `profile_methods`.
        max_prompts: prompts of each set; 0 means the profile's number.
    """
    profile = profile if isinstance(profile, Profile) else load_profile(profile)
    methods = profile_methods(profile, omegas, queries, None)
    return study_of(profile, methods, max_prompts=max_prompts)


def study_of(
    profile: Profile,
    methods: Sequence[Method],
    *,
    part: str = "",
    prompt_sets: Sequence[str | Path] = (),
    max_prompts: int | Mapping[str, int] = 0,
) -> Study:
    """Some methods under a profile's settings, on its prompt sets or on those given."""
    return Study(
        name=profile.name,
        methods=tuple(methods),
        prompt_sets=tuple(map(profile.prompt_set, prompt_sets)) or profile.prompt_sets,
        **profile.sampling,
        max_prompts=max_prompts or profile.max_prompts,
        batch_size=profile.batch_size,
        reference=profile.reference,
        reference_sets=(profile.benign_set,),
        part=part,
        captions_without=profile.concepts,
        chosen=profile.chosen,
        safety_set=profile.safety_set,
    )
