"""Clusters of blocks and what else came with sm_90 (PTX ISA, several chapters)."""

from __future__ import annotations

from .record import Form

_SYNC = "Parallel Synchronization and Communication Instructions: barrier.cluster"
_MOVE = "Data Movement and Conversion Instructions"
_MISC = "Miscellaneous Instructions"
_BARRIER = frozenset({"barrier"})

FORMS = (
    Form("mapa", "?shared::cluster T", ">d:T a:T b:u32", "cluster.mapa", _MOVE, {"T": "u32 u64"},
         (7, 8), 90, summary="the same address in another block of the cluster"),
    Form("getctarank", "?shared::cluster T", ">d:u32 a:T", "cluster.getctarank", _MOVE,
         {"T": "u32 u64"}, (7, 8), 90, summary="the block of the cluster that has an address"),
    Form("barrier", "cluster arrive ?R ?aligned", "", "cluster.arrive", _SYNC,
         {"R": "release relaxed"}, (7, 8), 90, effects=_BARRIER,
         summary="be counted at the cluster's barrier"),
    Form("barrier", "cluster wait ?acquire ?aligned", "", "cluster.wait", _SYNC, {}, (7, 8), 90,
         effects=_BARRIER, summary="wait until all threads of the cluster have arrived"),
    Form("setmaxnreg", "A sync aligned u32", "#n:u32", "registers.setmaxnreg", _MISC,
         {"A": "inc dec"}, (8, 0), arch="90a",
         summary="give back or get registers, to n a thread"),
)  # fmt: skip
