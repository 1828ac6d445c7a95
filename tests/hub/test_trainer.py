"""transformers' Trainer takes the steps of a plain loop."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from mor.hub.trainer import LoadBalancing
from mor.model.config import RouterConfig
from tests.conftest import random_tokens, tiny
from tests.hub.wrapped import wrapped


class Sequences(torch.utils.data.Dataset):
    def __init__(self, count):
        self.tokens = random_tokens(4, 16).repeat(count // 4, 1)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_takes_the_steps_that_a_plain_loop_takes(router, accumulate, tmp_path):
    model = wrapped(tiny(router))
    plain = wrapped(tiny(router)).train()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    data = Sequences(32)
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    order = [row["input_ids"] for batch in trainer.get_train_dataloader() for row in unbatch(batch)]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    expected = []
    for step in range(8):
        total = 0.0
        for part in torch.stack(order[4 * step : 4 * step + 4]).chunk(accumulate):
            loss = plain(part, labels=part).loss / accumulate
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(total)
    assert losses == pytest.approx(expected, abs=2e-4)  # Trainer rounds what it logs
    for (name, theirs), ours in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4, msg=name)
    assert losses[-1] < losses[0] - 0.1
    evaluated = trainer.evaluate(Sequences(8))["eval_loss"]
    tokens = Sequences(8).tokens
    with torch.no_grad():
        logits = model.eval()(tokens).logits[:, :-1]
        expected_eval = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert evaluated == pytest.approx(expected_eval, abs=1e-4)


def test_noise_on_embeddings_is_refused_by_its_name(tmp_path):
    model = wrapped()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        neftune_noise_alpha=5.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    with pytest.raises(ValueError, match="NEFTune is not supported"):
        Trainer(model=model, args=arguments, train_dataset=Sequences(4)).train()


def test_loss_free_balancing_follows_the_load_of_each_step(tmp_path):
    def made():
        return wrapped(
            tiny(RouterConfig(kind="token_choice", balancing="loss_free", bias_update_rate=0.02))
        )

    def trainer(model, *callbacks, steps=3):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(
            model=model, args=arguments, train_dataset=Sequences(4), callbacks=list(callbacks)
        )

    model = made()
    before = model.model.router.bias_R.clone()
    with torch.no_grad():
        load = torch.bincount(model(Sequences(4).tokens).depths.flatten(), minlength=4)[1:].double()
    trainer(model, LoadBalancing(), steps=1).train()
    router = model.model.router
    torch.testing.assert_close(
        router.bias_R, before + 0.02 * torch.sign(load.mean() - load).float()
    )
    assert router.bias_R.abs().max() > 0
    model(Sequences(4).tokens)  # neither evaluation nor a later forward counts
    trainer(model, LoadBalancing()).train()
    assert (router.bias_R / 0.02).abs().max() <= 4.001
    with pytest.warns(UserWarning, match="needs callbacks"):
        trainer(made(), steps=1).train()
    with pytest.raises(ValueError, match="balancing='loss_free'"):
        trainer(wrapped(tiny("token_choice")), LoadBalancing()).train()


def unbatch(batch):
    return [
        {name: value[i] for name, value in batch.items()} for i in range(len(batch["input_ids"]))
    ]
