"""Constants and types that several rooms share."""

import re
from typing import Literal

IGNORE_INDEX = -100  # a label without a loss, and no token: Hugging Face's and torch's value
MAX_NEW_TOKENS = 50  # of a generated answer: the protocol's (princeton-nlp/MeZO, large_models)
WHOLE_NUMBER = re.compile(r"-?(0|[1-9]\d{,999})")  # a label that is a whole number, as text; Python converts 4,300 digits
Dtype = Literal["float32", "bfloat16", "float16"]  # of a model's weights, by torch's name
