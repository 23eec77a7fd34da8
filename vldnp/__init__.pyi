# The public names, for editors, and for the package itself, which imports them when first used.
from .baselines.methods import SAFREE as SAFREE
from .baselines.methods import SLD as SLD
from .core.concepts import ConceptSet as ConceptSet
from .core.concepts import load_concepts as load_concepts
from .core.methods import CFG as CFG
from .core.methods import VLDNP as VLDNP
from .core.methods import Method as Method
from .core.methods import Static as Static
from .core.sampler import denoise as denoise
from .core.sampler import sample as sample
from .core.schedules import front_loaded as front_loaded
from .core.schedules import uniform as uniform
from .core.trace import Output as Output
from .core.trace import Step as Step
from .display.viewer import view as view
from .experiments.grid import Study as Study
from .experiments.profile import Profile as Profile
from .experiments.profile import load_profile as load_profile
from .experiments.profile_methods import profile_methods as profile_methods
from .experiments.profile_methods import profile_study as profile_study
from .experiments.run import run as run
from .metrics.summary import table as table
from .models.backbone import Backbone as Backbone
from .models.cnn_judge import CNNJudge as CNNJudge
from .models.judges import Judgement as Judgement
from .models.judges import NudeNetClassifier as NudeNetClassifier
from .models.judges import NudeNetJudge as NudeNetJudge
from .models.judges import SafetyChecker as SafetyChecker
from .models.load import load as load
from .models.load import load_clip as load_clip
from .models.load import load_judge as load_judge
from .models.load import load_vlm as load_vlm
from .models.vlm import TransformersVLM as TransformersVLM
from .models.vlm_server import RemoteVLM as RemoteVLM
from .prompts.table import load_prompts as load_prompts

__version__: str
