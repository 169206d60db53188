use super::*;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Wake;

/// An operation that ends when it is told to.
#[derive(Clone, Default)]
struct Op(Rc<Cell<Option<Result<(), Errno>>>>);

impl Future for Op {
    type Output = Result<(), Errno>;
    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.get().map_or(Poll::Pending, Poll::Ready)
    }
}

#[derive(Default)]
struct Count(AtomicU64);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn poll<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
}

fn watch(in_sync: &[u8]) -> StallWatch {
    let watch = StallWatch::default();
    set_in_sync(&watch, in_sync);
    watch
}

fn set_in_sync(watch: &StallWatch, slots: &[u8]) {
    watch.set_receiving(slots.iter().map(|&slot| (slot, true)));
}

/// To members of these slots, all in-sync when it was sent.
fn sent<'a>(watch: &'a StallWatch, slots: &[u8]) -> (FanOut<'a, Op>, Vec<Op>) {
    let mut fan_out = FanOut::new(watch);
    let ops: Vec<Op> = slots.iter().map(|_| Op::default()).collect();
    for (&slot, op) in slots.iter().zip(&ops) {
        fan_out.push(slot, true, op.clone());
    }
    (fan_out, ops)
}

/// Whether it ends with the deadline, and not before.
fn ends_with_the_deadline(watch: &StallWatch, fan_out: &mut FanOut<'_, Op>) -> bool {
    for _ in 0..TICKS_PER_DEADLINE {
        assert!(poll(fan_out).is_pending());
        watch.advance();
    }
    assert!(poll(fan_out).is_pending(), "within the deadline");
    watch.advance();
    let first = poll(fan_out).is_ready();
    watch.advance();
    assert_eq!(poll(fan_out).is_ready(), first);
    first
}

#[test]
fn the_set_of_in_sync_slots_is_known() {
    let some = watch(&[0, 3, 8]);
    let seen: Vec<u8> = (0..9).filter(|&slot| some.is_in_sync(slot)).collect();
    assert_eq!(seen, [0, 3, 8]);
    assert!(some.is_beyond(0b1001) && some.is_beyond(1 << 8) && some.is_beyond(0));
    assert!(!some.is_beyond(0b1_0000_1001) && !watch(&[]).is_beyond(0));
}

#[test]
fn when_a_request_may_be_given_up() {
    // Nobody has answered, and nobody else is there who could have.
    let all = watch(&[1, 2]);
    let (mut fan_out, ops) = sent(&all, &[1, 2]);
    assert!(!ends_with_the_deadline(&all, &mut fan_out));
    // One of them fails: still nobody has it.
    ops[0].0.set(Some(Err(Errno::IO)));
    assert!(poll(&mut fan_out).is_pending());
    // Whoever has not answered is not in-sync any more.
    set_in_sync(&all, &[1]);
    let Poll::Ready(outcomes) = poll(&mut fan_out) else {
        panic!("the last one that counts has answered");
    };
    assert_eq!(outcomes.common_error(&all), Some(Errno::IO));

    // One of them has it.
    let all = watch(&[1, 2]);
    let (mut fan_out, ops) = sent(&all, &[1, 2]);
    ops[1].0.set(Some(Ok(())));
    assert!(ends_with_the_deadline(&all, &mut fan_out));

    // It has it, but was lost meanwhile.
    let all = watch(&[1, 2]);
    let (mut fan_out, ops) = sent(&all, &[1, 2]);
    ops[1].0.set(Some(Ok(())));
    set_in_sync(&all, &[1]);
    assert!(!ends_with_the_deadline(&all, &mut fan_out));

    // There is another one that was not asked.
    for (asked, in_sync) in [
        ([1, 2], [0, 1, 2]),
        ([0, 1], [0, 1, 2]),
        ([0, 2], [1, 2, 0]),
    ] {
        let all = watch(&in_sync);
        let (mut fan_out, _ops) = sent(&all, &asked);
        assert!(ends_with_the_deadline(&all, &mut fan_out));
    }

    // It is limited.
    let all = watch(&[1, 2]);
    let (mut fan_out, _ops) = sent(&all, &[1, 2]);
    fan_out.limit_to_deadline();
    assert!(ends_with_the_deadline(&all, &mut fan_out));
}

/// Slots 0 and 1, and 2 that is resyncing.
fn with_a_resyncing_one() -> StallWatch {
    let all = StallWatch::default();
    all.set_receiving([(0, true), (1, true), (2, false)].into_iter());
    all
}

#[test]
fn a_stall_costs_one_deadline_whatever_was_asked_when() {
    for (lost, left) in [(1, [(0, true), (2, false)]), (2, [(0, true), (1, true)])] {
        let all = with_a_resyncing_one();
        let (mut first, ops) = sent(&all, &[0, lost]);
        ops[0].0.set(Some(Ok(())));
        for _ in 0..TICKS_PER_DEADLINE {
            all.advance();
        }
        let (mut second, later) = sent(&all, &[0, lost]);
        let (mut other, _ops) = sent(&all, &[0]);
        assert!(poll(&mut first).is_pending() && poll(&mut second).is_pending());
        all.advance();
        assert!(poll(&mut first).is_ready());
        assert!(poll(&mut second).is_pending(), "it is not lost yet");
        all.set_receiving(left.into_iter());
        assert!(
            poll(&mut second).is_pending(),
            "the other one is waited for"
        );
        later[0].0.set(Some(Ok(())));
        let Poll::Ready(outcomes) = poll(&mut second) else {
            panic!("only who was lost for a stall has not answered");
        };
        let results: Vec<_> = outcomes.iter().map(|o| o.result).collect();
        assert_eq!(results, [Ok(()), Err(Errno::TIMED_OUT)]);
        assert!(poll(&mut other).is_pending());
        // It comes back.
        all.set_receiving([(0, true), (1, true), (2, false)].into_iter());
        let (mut third, ops) = sent(&all, &[0, lost]);
        ops[0].0.set(Some(Ok(())));
        assert!(poll(&mut third).is_pending());
    }
}

#[test]
fn who_is_lost_for_something_else_may_answer() {
    let all = with_a_resyncing_one();
    let (mut sent, ops) = sent(&all, &[0, 1]);
    ops[0].0.set(Some(Ok(())));
    assert!(poll(&mut sent).is_pending());
    all.set_receiving([(0, true), (2, false)].into_iter());
    assert!(ends_with_the_deadline(&all, &mut sent));
}

#[test]
fn outcomes_are_those_of_the_operations() {
    let all = watch(&[0, 1, 2]);
    let (mut fan_out, ops) = sent(&all, &[0, 1, 2]);
    ops[0].0.set(Some(Ok(())));
    ops[1].0.set(Some(Err(Errno::NO_DEVICE)));
    assert!(poll(&mut fan_out).is_pending());
    ops[2].0.set(Some(Ok(())));
    let Poll::Ready(outcomes) = poll(&mut fan_out) else {
        panic!("all have answered");
    };
    let results: Vec<_> = outcomes.iter().map(|o| (o.slot, o.result)).collect();
    let expected = [(0, Ok(())), (1, Err(Errno::NO_DEVICE)), (2, Ok(()))];
    assert_eq!(results, expected);
    assert!(!outcomes.all_ok());
    assert_eq!(outcomes.common_error(&all), None);
    set_in_sync(&all, &[1]);
    assert_eq!(outcomes.common_error(&all), Some(Errno::NO_DEVICE));
    let (mut fan_out, ops) = sent(&all, &[0, 1]);
    ops.iter().for_each(|op| op.0.set(Some(Ok(()))));
    let Poll::Ready(outcomes) = poll(&mut fan_out) else {
        panic!("all have answered");
    };
    assert!(outcomes.all_ok());
}

#[test]
fn a_limited_operation_ends_after_its_steps() {
    let watch = watch(&[0]);
    let op = Op::default();
    let mut limited = Limited::new(&watch, op.clone(), 3);
    for _ in 0..3 {
        assert!(poll(&mut limited).is_pending());
        watch.advance();
    }
    assert!(poll(&mut limited).is_pending(), "within its time");
    watch.advance();
    assert_eq!(poll(&mut limited), Poll::Ready(None));
    let mut limited = Limited::new(&watch, op.clone(), 3);
    for _ in 0..9 {
        watch.advance();
    }
    assert_eq!(poll(&mut limited), Poll::Ready(None));
    let mut limited = Limited::new(&watch, op.clone(), 3);
    op.0.set(Some(Err(Errno::TIMED_OUT)));
    let answer = Poll::Ready(Some(Err(Errno::TIMED_OUT)));
    assert_eq!(poll(&mut limited), answer, "an answer all the same");
}

/// Whoever waits is woken by each step of time; when nobody waits, nobody has a place.
#[test]
fn places_are_left_and_taken_again() {
    let watch = watch(&[0, 1]);
    let count = Arc::new(Count::default());
    let waker = Waker::from(count.clone());
    for round in 1..4 {
        let (mut fan_out, _ops) = sent(&watch, &[0, 1]);
        let mut limited = Limited::new(&watch, Op::default(), 3);
        for _ in 0..2 {
            let mut context = Context::from_waker(&waker);
            assert!(Pin::new(&mut fan_out).poll(&mut context).is_pending());
            assert!(Pin::new(&mut limited).poll(&mut context).is_pending());
        }
        watch.advance();
        assert_eq!(count.0.load(Ordering::Relaxed), 2 * round);
        drop((fan_out, limited));
        let places = watch.places.borrow();
        assert_eq!((places.wakers.len(), places.free.len()), (2, 2));
    }
    watch.advance();
    assert_eq!(count.0.load(Ordering::Relaxed), 6);
}
