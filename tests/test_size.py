"""A checkpoint is small."""

import torch
import transformers
from torch.optim import AdamW
from torch.utils.data import DataLoader

from cola_lightning import COLAModule
from tests.toy import trainer


class OPT125M(COLAModule):
    """OPT-125m's shape; its weights do not matter here."""

    def build_model(self):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(transformers.OPTConfig())
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.01)
        model.tie_weights()
        return model

    def training_step(self, batch, batch_idx):
        return sum(parameter.sum() for parameter in self.parameters() if parameter.requires_grad) * 1e-3


def test_three_links_of_opt_125m_with_adams_state_take_less_than_8_mb(tmp_path):
    module = OPT125M(target_modules=["q_proj", "v_proj"], rank=8, seed=0, optimizer=lambda p: AdamW(p, lr=1e-3))
    run = trainer(tmp_path, chain={"every_n_train_steps": 1}, max_steps=3)
    run.fit(module, DataLoader(range(3), batch_size=1))
    path = tmp_path / "run.ckpt"
    run.save_checkpoint(path, weights_only=False)
    state = torch.load(path, weights_only=True)
    assert len(state["state_dict"]["cola"]["chain"]["description"]["links"]) == 2
    assert len(state["optimizer_states"][0]["state"]) == 2 * 24
    assert sum(parameter.numel() for parameter in module.model.parameters()) * 4 > 500e6
    assert path.stat().st_size < 8e6
