"""Resolution policies: how an image of any size becomes tiles, tokens and text. One interface, a name each.

A policy is a frozen dataclass. `plan(width, height)` says in integers what an image becomes and costs, `apply(image)`
returns the uint8 tiles. `POLICIES[name](...)` makes one.
"""

from fastmllm.data.resolution.anyres import ONEVISION_PINPOINTS, AnyRes
from fastmllm.data.resolution.cogagent import CogAgent
from fastmllm.data.resolution.fixed import Fixed
from fastmllm.data.resolution.idefics3 import Idefics3
from fastmllm.data.resolution.internvl import InternVL
from fastmllm.data.resolution.mllama import Mllama
from fastmllm.data.resolution.nanovlm import NanoVLM
from fastmllm.data.resolution.native import Native
from fastmllm.data.resolution.plan import Place, Plan, Policy, Regrid, Resize, Tile

POLICIES: dict[str, type[Policy]] = {
    "fixed": Fixed,
    "anyres": AnyRes,
    "internvl": InternVL,
    "idefics3": Idefics3,
    "nanovlm": NanoVLM,
    "native": Native,
    "mllama": Mllama,
    "cogagent": CogAgent,
}

__all__ = [
    "ONEVISION_PINPOINTS",
    "POLICIES",
    "AnyRes",
    "CogAgent",
    "Fixed",
    "Idefics3",
    "InternVL",
    "Mllama",
    "NanoVLM",
    "Native",
    "Place",
    "Plan",
    "Policy",
    "Regrid",
    "Resize",
    "Tile",
]
