import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from armhubert.superb.heads import both_ways


def test_an_lstm_reads_both_ways_as_packed_sequences_do():
    generator = torch.Generator().manual_seed(0)
    layer = nn.LSTM(6, 4, batch_first=True, bidirectional=True).double()
    lengths = torch.tensor([9, 12, 1, 2])
    x = torch.randn(4, 12, 6, generator=generator, dtype=torch.float64).requires_grad_()
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected = pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=12)[0]
    found = both_ways(layer, x, lengths)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    toward = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((found * toward).sum(), inputs),
        torch.autograd.grad((expected * toward).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
