"""Controls of the study: a guide that knows the prompt and no image, and a VLM with blind spots."""

from dataclasses import dataclass, replace

from moji.world.scenes import place_prior
from vldnp.baselines.controls import image_rng
from vldnp.concepts import ConceptSet, load_concepts
from vldnp.levers import Wrapped
from vldnp.methods import Method
from vldnp.negatives import Negative, Policy


@dataclass(frozen=True)
class PlacePrior(Policy):
    """The terms that the place in a prompt usually carries, from the first step on."""

    concepts: ConceptSet

    def initial(self, prompts, seeds):
        carried = map(place_prior, prompts)
        named = [tuple(term for term in self.concepts.terms if term in own) for own in carried]
        return [Negative(self.concepts.negative_prompt(terms), terms) for terms in named]

    def describe(self) -> dict:
        return {"kind": "place-prior", "concepts": self.concepts.describe()}


def place_prior_guide(concepts: str | ConceptSet, omega: float, lead: str = "") -> Method:
    """What VL-DNP might do without a VLM: it names by the prompt's place, whatever is generated."""
    concept_set = replace(load_concepts(concepts), lead=lead)
    return Method("place-prior", PlacePrior(concept_set), omega=omega)


@dataclass(frozen=True)
class BlindSpots(Wrapped):
    share: float
    seed: int = 0

    def look(self, view, before):
        after, batch = self.inner.look(view, before), view.guider.batch
        for k, row in enumerate(view.rows):
            if (new := after[k]) is not before[k] and new.failure is None:
                rng = image_rng(self.seed, batch.prompts[row], batch.seeds[row])
                draws = rng.random(len(self.concepts.terms))
                missed = {
                    t for t, u in zip(self.concepts.terms, draws, strict=True) if u < self.share
                }
                terms = tuple(term for term in new.concepts if term not in missed)
                prompt = self.concepts.negative_prompt(terms)
                after[k] = Negative(prompt, terms, new.answer, (0,) * len(terms))
        return after

    def describe(self) -> dict:
        own = {"share": self.share, "seed": self.seed}
        return {"kind": "blind-spots", **own, "policy": self.inner.describe()}


def blind_spots(method: Method, share: float, seed: int = 0) -> Method:
    """Each image's VLM misses each term with the probability `share`, and then at every query.

    Errors that are drawn anew at each query would be mended by the next one.
    """
    return replace(method, negatives=BlindSpots(method.negatives, share, seed))
