"""Where a classifier's new head starts. Drawn at random, it first has to find the classes, and disturbs meanwhile what the network below it
has learned; with the mean state of each class as its weights it tells them apart before the first step (imprinted weights: Qi et al.,
2018, arXiv:1712.07136; prototypes: Snell et al., 2017, arXiv:1703.05175).
"""

import torch
import torch.nn.functional as F

from recipes.common import models

ROWS = 20  # of each label: more change the means little and cost time
NOISE = 1 / 3  # dropout of a tenth moves a state by about a third of its length, so classes that lie closer than that can't be told apart
SCALES = (5, 10, 15, 20, 30)  # the largest logit, that of a state in the very direction of a class


@torch.no_grad()
def start_from_prototypes(model, task) -> None:
    """Set the head of `model` to the mean states of the classes in `task.train` (labels: one class a row), and say so.

    Its logits are the cosines with the class means, all states taken from their common mean where the head has a bias, times the scale
    that fits the rows best; smaller where the states hardly differ (a network that knows nothing yet). A class without rows starts at zero.
    """
    [head] = [module for name, module in model.named_modules() if name in task.drawn_at_random
              and isinstance(module, torch.nn.Linear) and module.out_features == model.config.num_labels]
    seen, chosen = {}, []
    for i, label in enumerate(task.train["labels"]):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= ROWS:
            chosen.append(i)
    device, home = models.device(), model.device
    model.to(device)
    states, labels = [], torch.tensor([task.train[i]["labels"] for i in chosen])
    handle = head.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    for start in range(0, len(chosen), 32):
        batch = task.collate([task.train[i] for i in chosen[start: start + 32]])
        inputs = {name: tensor.to(device) for name, tensor in batch.items() if name not in ("labels", "weights")}
        model(**inputs)
        if states[-1].dim() == 3:  # a decoder's head is applied to every token, and the last one's logits count
            states[-1] = states[-1][torch.arange(len(states[-1])), inputs["attention_mask"].sum(1) - 1]
    handle.remove()
    model.to(home)
    states = torch.cat(states).float().cpu()
    centre = states.mean(0) if head.bias is not None else torch.zeros_like(states[0])
    directions = F.normalize(states - centre, dim=1)
    means = F.normalize(F.one_hot(labels, head.out_features).T.float() @ directions, dim=1)
    cosines = directions @ means.T
    scale = min(SCALES, key=lambda scale: F.cross_entropy(scale * cosines, labels).item())
    size = torch.maximum((states - centre).norm(dim=1).mean(), NOISE * states.norm(dim=1).mean())
    weight = scale * means / size
    head.weight.copy_(weight)
    if head.bias is not None:
        head.bias.copy_(-weight @ centre)
    print(f"note: the new head starts from the mean states of the {len(seen)} labels, which tell "
          f"{100 * (cosines.argmax(1) == labels).float().mean():.0f} % of {len(chosen)} train rows (--head_start random: from nothing)")
