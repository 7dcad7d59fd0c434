"""How good a method is for each user, and how sure one may be: `evaluate` a model, `compare` methods, keep an `Evaluation`."""

from palate.evaluation.bootstrap import Estimate
from palate.evaluation.comparison import compare
from palate.evaluation.evaluating import evaluate
from palate.evaluation.result import Evaluation

__all__ = ["Estimate", "Evaluation", "compare", "evaluate"]
