"""ToFU, the Task of Fictitious Unlearning: its published metrics, for a model or for recorded logs.

Maini et al. 2024 (arXiv 2401.06121). Definitions follow the code that the published numbers come from
(github.com/locuslab/tofu, github.com/locuslab/open-unlearning); where that and the paper differ, the option is named.
All losses are token means in nats, the marker that ends an answer counted as one of its tokens.

Four sets of questions: `retain` and `forget` (with a paraphrase of each answer, and five wrong ones in its form), and
`real_authors` and `world_facts` (with three wrong options). A log holds the losses and the ROUGE of each question;
everything else is arithmetic on logs.
"""

from .evaluation import LOG, RESULT, RETRAINED_LOG, Retrained, evaluate, measure, measure_retrained, run
from .questions import HUB, TEMPLATE, Inputs, Question, encode, read_questions
from .scores import (
    OPTIONS,
    SETS,
    Log,
    SetScores,
    Tofu,
    forget_quality,
    harmonic_mean,
    log_from_json,
    log_truth_ratio,
    probability,
    read_log,
    rouge_l_recall,
    score,
    truth_score,
)

__all__ = [
    "HUB",
    "LOG",
    "OPTIONS",
    "RESULT",
    "RETRAINED_LOG",
    "SETS",
    "TEMPLATE",
    "Inputs",
    "Log",
    "Question",
    "Retrained",
    "SetScores",
    "Tofu",
    "encode",
    "evaluate",
    "forget_quality",
    "harmonic_mean",
    "log_from_json",
    "log_truth_ratio",
    "measure",
    "measure_retrained",
    "probability",
    "read_log",
    "read_questions",
    "rouge_l_recall",
    "run",
    "score",
    "truth_score",
]  # fmt: skip
