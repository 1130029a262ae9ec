"""The runner of a plan's steps and its pool of native threads, as LLVM IR text.

`sf_run(steps, count, threads) -> i64` runs steps in order and returns how many it finished: it
stops after a step that left a nonzero status. A step is seven 8-byte fields (`STEP_FIELDS`): the
kernel, its arguments, the extent of its flattened loop, the smallest range worth a thread, scratch
and its size for each thread, the status. The first word of a thread's scratch is 0 when it begins
with a step. One without a kernel ends a loop: `arguments` point to
the number of the turn, which starts at 0, and the addresses of as many copies of it as `stride`
says; until there have been `count` turns it goes on `grain` records before it. Ranges of `grain`
iterations are handed out by an atomic counter. One caller at a time has the pool; others, and
steps of a single range, run inline.

How the threads meet: `ticket` holds a counter and, in its low byte, how many threads take part.
The caller writes the job, then the ticket, and works too. A worker whose number is below that
takes ranges until none are left and counts itself off in `pending`. Both sides spin a little and
then wait on a futex. `sf_pool_stop` ends the threads; `sf_pool_reset` forgets them, for a child
process after fork.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

STEP_FIELDS = ("function", "arguments", "count", "grain", "scratch", "stride", "status")
STEP_BYTES = 8 * len(STEP_FIELDS)
MAX_THREADS = 64
SPINS = 200


def pack_steps(steps: Iterable[tuple[int, int, int, int, int, int, int]]) -> bytes:
    """Step records for `sf_run`; see `STEP_FIELDS`."""
    return b"".join(struct.pack("<7q", *step) for step in steps)


def pool_text() -> str:
    """The module's part: globals and functions."""
    return (
        _TEXT.replace("$STEP", STEP).replace("$MAX", str(MAX_THREADS)).replace("$SPINS", str(SPINS))
    )


STEP = "{ ptr, ptr, i64, i64, ptr, i64, ptr }"

_TEXT = """
@sf.ticket = internal global i32 0, align 64
@sf.sleepers = internal global i32 0, align 64
@sf.pending = internal global i32 0, align 64
@sf.waiting = internal global i32 0, align 64
@sf.next = internal global i64 0, align 64
@sf.lock = internal global i32 0, align 64
@sf.workers = internal global i32 0, align 4
@sf.quit = internal global i32 0, align 4
@sf.job = internal global $STEP zeroinitializer, align 64
@sf.threads = internal global [$MAX x i64] zeroinitializer, align 16

declare i64 @syscall(i64, ...) nounwind
declare i32 @pthread_create(ptr, ptr, ptr, ptr) nounwind
declare i32 @pthread_join(i64, ptr) nounwind
declare void @llvm.x86.sse2.pause()

define internal void @sf.futex_wait(ptr %word, i32 %seen) noinline nounwind {
  %r = call i64 (i64, ...) @syscall(
      i64 202, ptr %word, i64 128, i32 %seen, ptr null, ptr null, i64 0)
  ret void
}

define internal void @sf.futex_wake(ptr %word) noinline nounwind {
  %r = call i64 (i64, ...) @syscall(
      i64 202, ptr %word, i64 129, i64 2147483647, ptr null, ptr null, i64 0)
  ret void
}

define internal void @sf.unmark(ptr %scratch, i64 %bytes) alwaysinline nounwind {
entry:
  %any = icmp sgt i64 %bytes, 0
  br i1 %any, label %clear, label %done
clear:
  store i64 0, ptr %scratch, align 8
  br label %done
done:
  ret void
}

define internal void @sf.take_ranges(i64 %thread) noinline nounwind {
entry:
  %step = load $STEP, ptr @sf.job, align 8
  %fn = extractvalue $STEP %step, 0
  %args = extractvalue $STEP %step, 1
  %count = extractvalue $STEP %step, 2
  %grain = extractvalue $STEP %step, 3
  %base = extractvalue $STEP %step, 4
  %stride = extractvalue $STEP %step, 5
  %status = extractvalue $STEP %step, 6
  %offset = mul i64 %stride, %thread
  %scratch = getelementptr i8, ptr %base, i64 %offset
  call void @sf.unmark(ptr %scratch, i64 %stride)
  br label %take
take:
  %begin = atomicrmw add ptr @sf.next, i64 %grain seq_cst, align 8
  %left = icmp slt i64 %begin, %count
  br i1 %left, label %run, label %done
run:
  %stop = add i64 %begin, %grain
  %end = call i64 @llvm.smin.i64(i64 %stop, i64 %count)
  call void %fn(ptr %args, i64 %begin, i64 %end, ptr %scratch, ptr %status)
  br label %take
done:
  ret void
}

define internal ptr @sf.worker(ptr %number) nounwind {
entry:
  %thread = ptrtoint ptr %number to i64
  %self = trunc i64 %thread to i32
  br label %idle
idle:
  %seen = phi i32 [ 0, %entry ], [ %now, %next ]
  br label %spin
spin:
  %turn = phi i32 [ 0, %idle ], [ %turn2, %pause ]
  %now1 = load atomic i32, ptr @sf.ticket acquire, align 4
  %new1 = icmp ne i32 %now1, %seen
  br i1 %new1, label %woken, label %pause
pause:
  call void @llvm.x86.sse2.pause()
  %turn2 = add i32 %turn, 1
  %again = icmp slt i32 %turn2, $SPINS
  br i1 %again, label %spin, label %sleep
sleep:
  %s1 = atomicrmw add ptr @sf.sleepers, i32 1 seq_cst, align 4
  %now2 = load atomic i32, ptr @sf.ticket seq_cst, align 4
  %new2 = icmp ne i32 %now2, %seen
  br i1 %new2, label %risen, label %wait
wait:
  call void @sf.futex_wait(ptr @sf.ticket, i32 %seen)
  br label %risen
risen:
  %s2 = atomicrmw sub ptr @sf.sleepers, i32 1 seq_cst, align 4
  %now3 = load atomic i32, ptr @sf.ticket acquire, align 4
  %new3 = icmp ne i32 %now3, %seen
  br i1 %new3, label %woken, label %sleep
woken:
  %now = phi i32 [ %now1, %spin ], [ %now3, %risen ]
  %quit = load atomic i32, ptr @sf.quit acquire, align 4
  %stop = icmp ne i32 %quit, 0
  br i1 %stop, label %end, label %part
part:
  %wanted = and i32 %now, 255
  %takes = icmp slt i32 %self, %wanted
  br i1 %takes, label %work, label %next
work:
  call void @sf.take_ranges(i64 %thread)
  %before = atomicrmw sub ptr @sf.pending, i32 1 seq_cst, align 4
  %last = icmp eq i32 %before, 1
  br i1 %last, label %notify, label %next
notify:
  %asleep = load atomic i32, ptr @sf.waiting seq_cst, align 4
  %wake = icmp ne i32 %asleep, 0
  br i1 %wake, label %call, label %next
call:
  call void @sf.futex_wake(ptr @sf.pending)
  br label %next
next:
  br label %idle
end:
  ret ptr null
}

define internal void @sf.publish(i32 %threads) nounwind {
entry:
  %old = load atomic i32, ptr @sf.ticket monotonic, align 4
  %counter = and i32 %old, -256
  %moved = add i32 %counter, 256
  %new = or i32 %moved, %threads
  store atomic i32 %new, ptr @sf.ticket seq_cst, align 4
  fence seq_cst
  %sleepers = load atomic i32, ptr @sf.sleepers seq_cst, align 4
  %any = icmp ne i32 %sleepers, 0
  br i1 %any, label %wake, label %done
wake:
  call void @sf.futex_wake(ptr @sf.ticket)
  br label %done
done:
  ret void
}

define internal void @sf.join() nounwind {
entry:
  br label %spin
spin:
  %turn = phi i32 [ 0, %entry ], [ %turn2, %pause ]
  %left = load atomic i32, ptr @sf.pending acquire, align 4
  %done = icmp eq i32 %left, 0
  br i1 %done, label %end, label %pause
pause:
  call void @llvm.x86.sse2.pause()
  %turn2 = add i32 %turn, 1
  %again = icmp slt i32 %turn2, $SPINS
  br i1 %again, label %spin, label %sleep
sleep:
  store atomic i32 1, ptr @sf.waiting seq_cst, align 4
  %left2 = load atomic i32, ptr @sf.pending seq_cst, align 4
  %done2 = icmp eq i32 %left2, 0
  br i1 %done2, label %awake, label %wait
wait:
  call void @sf.futex_wait(ptr @sf.pending, i32 %left2)
  br label %sleep
awake:
  store atomic i32 0, ptr @sf.waiting seq_cst, align 4
  br label %end
end:
  ret void
}

define internal i32 @sf.grow(i32 %wanted) nounwind {
entry:
  %limit = call i32 @llvm.smin.i32(i32 %wanted, i32 $MAX)
  br label %more
more:
  %have = load i32, ptr @sf.workers, align 4
  %total = add i32 %have, 1
  %enough = icmp sge i32 %total, %limit
  br i1 %enough, label %done, label %create
create:
  %at = sext i32 %total to i64
  %slot = getelementptr i64, ptr @sf.threads, i64 %at
  %number = inttoptr i64 %at to ptr
  %failed = call i32 @pthread_create(ptr %slot, ptr null, ptr @sf.worker, ptr %number)
  %ok = icmp eq i32 %failed, 0
  br i1 %ok, label %created, label %done
created:
  store i32 %total, ptr @sf.workers, align 4
  br label %more
done:
  %result = call i32 @llvm.smin.i32(i32 %total, i32 %limit)
  ret i32 %result
}

define i64 @sf_run(ptr %steps, i64 %count, i64 %threads) nounwind {
entry:
  %many = icmp sgt i64 %threads, 1
  br i1 %many, label %try, label %begin
try:
  %swapped = cmpxchg ptr @sf.lock, i32 0, i32 1 seq_cst seq_cst, align 4
  %got = extractvalue { i32, i1 } %swapped, 1
  br label %begin
begin:
  %pool = phi i1 [ false, %entry ], [ %got, %try ]
  %top = call i64 @llvm.smin.i64(i64 %threads, i64 $MAX)
  %wanted = trunc i64 %top to i32
  %empty = icmp sle i64 %count, 0
  br i1 %empty, label %end, label %step
step:
  %i = phi i64 [ 0, %begin ], [ %i2, %next ]
  %at = getelementptr $STEP, ptr %steps, i64 %i
  %record = load $STEP, ptr %at, align 8
  %fn = extractvalue $STEP %record, 0
  %args = extractvalue $STEP %record, 1
  %size = extractvalue $STEP %record, 2
  %grain = extractvalue $STEP %record, 3
  %scratch = extractvalue $STEP %record, 4
  %status = extractvalue $STEP %record, 6
  %something = icmp sgt i64 %size, 0
  br i1 %something, label %kind, label %next
kind:
  %loops = icmp eq ptr %fn, null
  br i1 %loops, label %turn, label %choose
turn:
  %copies = extractvalue $STEP %record, 5
  %turned = load i64, ptr %args, align 8
  %turn1 = add i64 %turned, 1
  %again = icmp slt i64 %turn1, %size
  %turn2 = select i1 %again, i64 %turn1, i64 0
  store i64 %turn2, ptr %args, align 8
  %back = sub i64 0, %grain
  %jump = select i1 %again, i64 %back, i64 1
  br label %copy
copy:
  %c = phi i64 [ 0, %turn ], [ %c1, %write ]
  %c1 = add i64 %c, 1
  %left = icmp slt i64 %c, %copies
  br i1 %left, label %write, label %next
write:
  %entry2 = getelementptr i64, ptr %args, i64 %c1
  %slot = load ptr, ptr %entry2, align 8
  store i64 %turn2, ptr %slot, align 8
  br label %copy
choose:
  %sane = icmp sgt i64 %grain, 0
  %large = icmp sgt i64 %size, %grain
  %split1 = and i1 %pool, %sane
  %split = and i1 %split1, %large
  br i1 %split, label %parallel, label %inline
inline:
  %stride = extractvalue $STEP %record, 5
  call void @sf.unmark(ptr %scratch, i64 %stride)
  call void %fn(ptr %args, i64 0, i64 %size, ptr %scratch, ptr %status)
  br label %check
parallel:
  %up = sub i64 %grain, 1
  %sum = add i64 %size, %up
  %ranges = sdiv i64 %sum, %grain
  %few = call i64 @llvm.smin.i64(i64 %ranges, i64 %top)
  %asked = trunc i64 %few to i32
  %team = call i32 @sf.grow(i32 %asked)
  %alone = icmp slt i32 %team, 2
  br i1 %alone, label %inline, label %share
share:
  store $STEP %record, ptr @sf.job, align 8
  store atomic i64 0, ptr @sf.next monotonic, align 8
  %others = sub i32 %team, 1
  store atomic i32 %others, ptr @sf.pending monotonic, align 4
  call void @sf.publish(i32 %team)
  call void @sf.take_ranges(i64 0)
  call void @sf.join()
  br label %check
check:
  %code = load i64, ptr %status, align 8
  %bad = icmp ne i64 %code, 0
  br i1 %bad, label %end, label %next
next:
  %by = phi i64 [ 1, %step ], [ 1, %check ], [ %jump, %copy ]
  %i2 = add i64 %i, %by
  %more = icmp slt i64 %i2, %count
  br i1 %more, label %step, label %end
end:
  %finished = phi i64 [ 0, %begin ], [ %i, %check ], [ %count, %next ]
  br i1 %pool, label %unlock, label %return
unlock:
  store atomic i32 0, ptr @sf.lock seq_cst, align 4
  br label %return
return:
  ret i64 %finished
}

define void @sf_pool_stop() nounwind {
entry:
  store atomic i32 1, ptr @sf.quit seq_cst, align 4
  call void @sf.publish(i32 0)
  br label %next
next:
  %left = load i32, ptr @sf.workers, align 4
  %any = icmp sgt i32 %left, 0
  br i1 %any, label %join, label %end
join:
  %at = sext i32 %left to i64
  %slot = getelementptr i64, ptr @sf.threads, i64 %at
  %thread = load i64, ptr %slot, align 8
  %r = call i32 @pthread_join(i64 %thread, ptr null)
  %less = sub i32 %left, 1
  store i32 %less, ptr @sf.workers, align 4
  br label %next
end:
  store atomic i32 0, ptr @sf.quit seq_cst, align 4
  ret void
}

define void @sf_pool_reset() nounwind {
entry:
  store i32 0, ptr @sf.workers, align 4
  store atomic i32 0, ptr @sf.ticket seq_cst, align 4
  store atomic i32 0, ptr @sf.sleepers seq_cst, align 4
  store atomic i32 0, ptr @sf.pending seq_cst, align 4
  store atomic i32 0, ptr @sf.waiting seq_cst, align 4
  store atomic i32 0, ptr @sf.lock seq_cst, align 4
  ret void
}
"""
