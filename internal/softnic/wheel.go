package softnic

import "time"

// A wheel holds the timers of a netPort: when which connection is to be looked at. A timer that is put off stays where it is, and
// whoever finds it there puts it where it has to be by then; since nearly all are put off (by acknowledgements), setting one
// again costs nothing. Guarded by the port's mu.
type wheel struct {
	slots [wheelSlots]*wireQP // the first of those in it
	next  int64               // the tick that is looked at next
	soon  int64               // there is no timer before
	count int
}

const (
	wheelTick  = 32 * time.Microsecond
	wheelSlots = 1024 // a turn takes 33 ms; timers further away are put off once a turn
)

// set has w looked at once the time is at, or before. now is the time.
func (h *wheel) set(w *wireQP, at, now time.Duration) {
	if h.count == 0 {
		h.next = int64(now / wheelTick)
		h.soon = h.next + wheelSlots
	}
	t := int64(at/wheelTick) + 1
	t = min(max(t, h.next), h.next+wheelSlots-1)
	if w.tick != 0 && w.tick <= t {
		return
	}
	h.soon = min(h.soon, t)
	if w.tick != 0 {
		h.remove(w)
	}
	s := &h.slots[t%wheelSlots]
	w.tick, w.after = t, *s
	if w.after != nil {
		w.after.before = w
	}
	*s = w
	h.count++
}

// remove takes w, whose timer is set, out of its slot.
func (h *wheel) remove(w *wireQP) {
	if w.before == nil {
		h.slots[w.tick%wheelSlots] = w.after
	} else {
		w.before.after = w.after
	}
	if w.after != nil {
		w.after.before = w.before
	}
	w.tick, w.before, w.after = 0, nil, nil
	h.count--
}

// due calls f for every timer that has come. f may set timers.
func (h *wheel) due(now time.Duration, f func(*wireQP)) {
	for last := int64(now / wheelTick); h.count > 0 && h.next <= last; {
		t := h.next
		h.next++
		s := &h.slots[t%wheelSlots]
		w := *s
		*s = nil // f may set timers for a whole turn later, which is this slot. Those of t it does not move: they are due
		for w != nil {
			x := w
			w = x.after
			x.tick, x.before, x.after = 0, nil, nil
			h.count--
			f(x)
		}
	}
}

// first returns when the next timer comes; 0: there is none.
func (h *wheel) first() time.Duration {
	if h.count == 0 {
		return 0
	}
	for t := max(h.next, h.soon); t < h.next+wheelSlots; t++ {
		if h.slots[t%wheelSlots] != nil {
			h.soon = t
			return time.Duration(t) * wheelTick
		}
	}
	return 0
}
