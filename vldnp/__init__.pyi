# The public names, for editors, and for the package itself, which imports them when first used.

from .baselines.categories import CASG as CASG
from .baselines.categories import Summed as Summed
from .baselines.nag import NAG as NAG
from .baselines.safe_denoiser import Repelled as Repelled
from .baselines.safree import SAFREE as SAFREE
from .baselines.sld import SLD as SLD
from .concepts import ConceptSet as ConceptSet
from .concepts import load_concepts as load_concepts
from .methods import CFG as CFG
from .methods import VLDNP as VLDNP
from .methods import Method as Method
from .methods import Static as Static
from .metrics.summary import table as table
from .models.backbone import Backbone as Backbone
from .models.judges import Judgement as Judgement
from .models.load import load as load
from .models.load import load_clip as load_clip
from .models.load import load_judge as load_judge
from .models.load import load_preview as load_preview
from .models.load import load_vlm as load_vlm
from .pipeline import guiding as guiding
from .sampler import denoise as denoise
from .sampler import sample as sample
from .schedules import front_loaded as front_loaded
from .schedules import uniform as uniform
from .show.viewer import view as view
from .study.grid import Study as Study
from .study.profile import Profile as Profile
from .study.profile import load_profile as load_profile
from .study.profile import profile_methods as profile_methods
from .study.profile import profile_study as profile_study
from .study.prompts import load_prompts as load_prompts
from .study.run import run as run
from .trace import Output as Output
from .trace import Step as Step

__version__: str
