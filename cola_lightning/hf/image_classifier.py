"""Image classifiers: a pretrained model of pictures with a new head."""

import functools
from typing import Any, ClassVar

from typing_extensions import override

from cola_lightning.hf.classifier import Classifier


class COLAImageClassifier(Classifier):
    """A classifier of pictures that is fine-tuned with a chain of low-rank links; its new head is fully trained.

    It takes any model of transformers' ``AutoModelForImageClassification``: vision transformers, ResNet, ConvNeXt and others,
    and those of timm by their hub ids (``pip install timm``). Its labels are the given ones, a checkpoint's, or the data's,
    which ``ImageDataModule`` sets before the model is made. Its batches are dicts of ``pixel_values`` and ``labels``.

    Its arguments are those of :class:`~cola_lightning.hf.classifier.Classifier`; ``cola fit --model.help COLAImageClassifier``
    says what each does.

    Raises:
        UserError: as for :class:`~cola_lightning.COLACausalLM`.
    """

    auto_class: ClassVar[str] = "AutoModelForImageClassification"

    @functools.cached_property
    def tokenizer(self) -> None:
        """None: its inputs are pictures."""

    @functools.cached_property
    def image_processor(self) -> Any:
        """What makes inputs of pictures: their size, mean and standard deviation. Data modules use it, and exports write it."""
        from transformers import AutoImageProcessor

        return self.pretrained.load(AutoImageProcessor)

    @override
    def describe_labels(self, config: Any) -> None:
        super().describe_labels(config)
        if hasattr(config, "label_names"):  # of timm's, whose configuration is written with these
            config.label_names = list(config.id2label.values())

    @override
    def choose_modules_to_save(self, model: Any) -> list[str]:
        """The head, and other modules that the pretrained files do not contain. timm's head is inside of the body."""
        if chosen := super().choose_modules_to_save(model):
            return chosen
        head = model.timm_model.get_classifier()
        return [name for name, module in model.named_modules() if module is head]
