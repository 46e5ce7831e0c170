"""Chain of LoRA (COLA) for PyTorch Lightning: fine-tuning by a chain of low-rank updates.

Names are imported when first used, so that ``import cola_lightning`` takes no time and imports neither torch nor lightning;
``__init__.pyi`` lists the names and their files.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
