"""RULER: synthetic tasks of any length that ask a model what it remembers (Hsieh et al. 2024, arXiv 2404.06654).

The tasks and their wording are RULER's. What differs: samples are as long as a length allows, and not in steps; the
haystack begins at a drawn word of the text that is given; words are those of `words`, not of a package; the worked
example of variable tracking is shorter; two-hop questions are made up unless a file of HotpotQA's form is given.
"""

from jaxcompress.evaluation.ruler.sweep import EXPERIMENT, METRIC, Plan
from jaxcompress.evaluation.ruler.tasks import TASKS

__all__ = ["EXPERIMENT", "METRIC", "TASKS", "Plan"]
