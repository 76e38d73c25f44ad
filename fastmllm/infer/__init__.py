"""Generate from and score with a model: greedy, sampled, and over closed sets."""

from fastmllm.infer.chat import generate as generate
from fastmllm.infer.chat import stream as stream
from fastmllm.infer.sampling import SamplingParams as SamplingParams
