"""Bytes counted in programs written by hand, in each form that XLA writes groups."""

import pytest

from jaxmodels.training.communication import bytes_sent

PROGRAM = """HloModule example

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %r = (f32[8,4]{1,0}, /*index=1*/f32[]) all-reduce(%x, %y), replica_groups={{0,1},{2,3}}
  %moved = (u8[10]{0}, u8[10]{0}) collective-permute-start(%z), source_target_pairs={{0,1},{1,0}}
}

%never (p: f32[]) -> f32[] {
  %lost = f32[100]{0} collective-permute(%z), source_target_pairs={{0,1},{1,0}}
}

%left (p: f32[]) -> f32[] {
  %scattered = f32[3]{0} reduce-scatter(%z), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
}

ENTRY %main (q: f32[16]) -> f32[] {
  %loop = (s32[], f32[8,4]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %g = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%b), replica_groups=[2,4]<=[8], dimensions={0}
  %e = (f32[4]{0}, f32[4]{0}) all-to-all(%c, %d), replica_groups=mesh['a'=8,'b'=2] {'a':(2)2}
  %one = f32[] conditional(%p, %i, %j), branch_computations={%left, %add}
  %half = f32[] add(%one, %all-reduce.1)
}
"""


def test_loops_branches_and_groups_are_read():
    assert bytes_sent(PROGRAM) == {
        "all-reduce": 3 * 4 * (8 * 4 + 1),
        "collective-permute": 3 * 10,
        "all-gather": 3 * 2 * 16 // 4,
        "reduce-scatter": 3 * 4 * 3,
        "all-to-all": 4 * (4 + 4) // 2,
    }


def test_groups_in_a_form_not_known_are_an_error():
    with pytest.raises(ValueError, match=r"bytes_sent: cannot read the groups of '%g = .bf16"):
        bytes_sent(PROGRAM.replace("[2,4]<=[8]", "all"))
