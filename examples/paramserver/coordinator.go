package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// trainConfig is what the server decides for everybody.
type trainConfig struct {
	workers   int  // training starts when so many have joined; later any number will do
	sync      bool // all gradients of a step are reduced before the next one; otherwise each is applied on arrival
	staleness int  // not sync: how many gradients a worker may be ahead of the slowest one
	epochs    int
	batch     int // images a step (sync), or that the workers have under way together (not sync)
	rate      float64
	momentum  float64
	seed      uint64
}

func (c *trainConfig) check() error {
	switch {
	case c.workers < 1 || c.workers > maxSlots:
		return fmt.Errorf("workers: %d is not between 1 and %d", c.workers, maxSlots)
	case c.epochs < 1:
		return fmt.Errorf("epochs: %d is less than 1", c.epochs)
	case c.batch < c.workers:
		return fmt.Errorf("batch: %d images cannot be shared by %d workers", c.batch, c.workers)
	case c.staleness < 0:
		return fmt.Errorf("staleness: %d is negative", c.staleness)
	case !(c.rate > 0) || !(c.momentum >= 0 && c.momentum < 1):
		return fmt.Errorf("rate %v and momentum %v: the rate must be positive, momentum in [0, 1)", c.rate, c.momentum)
	}
	return nil
}

// share is the number of images of one gradient in bounded-staleness mode.
func (c *trainConfig) share() int { return (c.batch + c.workers - 1) / c.workers }

// epochStat is what an epoch ended with.
type epochStat struct {
	epoch    int
	version  uint64
	accuracy float64 // on the digits held out
	loss     float64 // mean over the images trained on
	workers  int
	maxAhead uint64  // gradients that a worker was ahead of the slowest one
	meanLag  float64 // versions between the one that a gradient was computed at and the one it was applied to
	maxLag   uint64
	elapsed  time.Duration
}

// A coordinator trains: it knows the members, decides who computes what, and turns gradients into versions. It knows
// no network: the server calls it for RPCs, notifications and deaths. Safe for concurrent use.
//
// Synchronous steps open when every member of the last one is through with it, with all members that are ready then;
// whoever joins later waits for the next step. A death shrinks the step: the gradient is the mean of those that came.
type coordinator struct {
	cfg       trainConfig
	trainSize int
	heldOut   []digit
	board     boardWriter
	slots     []byte // maxSlots times slotBytes, where gradients arrive
	onEpoch   func(epochStat)

	mu        sync.Mutex
	changed   chan struct{} // closed and replaced whenever a waiter should look again
	members   [maxSlots]*member
	joined    int // members so far; numbers them
	started   bool
	open      bool // sync: a step is under way
	finished  bool
	step      int // sync: the step under way
	ranks     int // sync: how many share it
	epoch     int // epochs finished
	version   uint64
	params    []float32
	sum       []float32
	opt       optimizer
	images    int // in the gradients of this epoch
	seen      int // in all gradients applied
	loss      float64
	maxAhead  uint64
	applied   uint64 // gradients
	sumLag    uint64 // over all of them
	maxLag    uint64
	epochFrom time.Time
}

// member is a worker from its join until its connection ends.
type member struct {
	id   int
	slot int
	gone chan struct{} // closed by leave

	// Guarded by the coordinator's mutex.
	ready  bool   // has asked for work
	clock  uint64 // gradients pushed
	rank   int    // within the step under way, or -1
	pushed bool   // the step's gradient is there
	grad   gradient
}

var (
	errFull = fmt.Errorf("all %d slots are taken", maxSlots)
	errGone = errors.New("the worker is no longer a member")
	errOver = errors.New("training is over")
)

func newCoordinator(cfg trainConfig, trainSize int, heldOut []digit, board, slots []byte, onEpoch func(epochStat)) *coordinator {
	c := &coordinator{
		cfg: cfg, trainSize: trainSize, heldOut: heldOut, board: boardWriter{words(board)}, slots: slots, onEpoch: onEpoch,
		changed: make(chan struct{}), version: 1,
		params: make([]float32, paramCount), sum: make([]float32, paramCount),
		opt: optimizer{rate: float32(cfg.rate), momentum: float32(cfg.momentum)},
	}
	initParams(c.params, cfg.seed)
	c.board.publish(c.version, c.params)
	return c
}

// slotMemory is where the worker in a slot pushes its gradients.
func (c *coordinator) slotMemory(slot int) []byte {
	return c.slots[slot*slotBytes:][:slotBytes:slotBytes]
}

func (c *coordinator) wakeLocked() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// join makes a member, with a free slot, and returns it with the clock that it starts at.
func (c *coordinator) join() (*member, uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.finished {
		return nil, 0, errOver
	}
	for slot := range c.members {
		if c.members[slot] == nil {
			c.joined++
			// A newcomer starts level with the slowest: from zero it would hold everybody back.
			m := &member{id: c.joined, slot: slot, gone: make(chan struct{}), clock: c.slowestLocked(), rank: -1}
			c.members[slot] = m
			c.board.setApplied(slot, m.clock)
			return m, m.clock, nil
		}
	}
	return nil, 0, errFull
}

// leave ends a membership and frees the slot. What the others wait for goes on without it.
func (c *coordinator) leave(m *member) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.members[m.slot] != m {
		return
	}
	c.members[m.slot] = nil
	close(m.gone)
	if c.finished {
		return
	}
	if c.cfg.sync {
		c.advanceLocked()
	} else {
		c.board.setClock(c.slowestLocked())
	}
	c.wakeLocked()
}

// assignment is a worker's next work.
type assignment struct {
	done    bool
	version uint64 // sync: the parameters to use
	epoch   int
	batch   int // sync: number of the batch within the epoch
	rank    int // sync: take the images of the batch whose number is rank modulo of
	of      int
}

// next waits until the member, which says to have pushed clock gradients, may compute another: its barrier. The call may
// overtake the announcement of the last of them, and then waits for that too. It ends with ctx, and with errGone.
func (c *coordinator) next(ctx context.Context, m *member, clock uint64) (assignment, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.members[m.slot] != m {
		return assignment{}, errGone
	}
	if !m.ready {
		m.ready = true
		c.beginLocked()
	}
	for {
		if c.finished {
			return assignment{done: true}, nil
		}
		if c.cfg.sync {
			if c.open && m.rank >= 0 && !m.pushed && m.clock >= clock {
				return assignment{version: c.version, epoch: c.epoch, batch: c.step % c.stepsAnEpoch(), rank: m.rank, of: c.ranks}, nil
			}
		} else if c.started && m.clock >= clock && m.clock-c.slowestLocked() <= uint64(c.cfg.staleness) {
			return assignment{version: c.version, epoch: c.epoch}, nil
		}
		changed := c.changed
		c.mu.Unlock()
		var err error
		select {
		case <-changed:
		case <-m.gone:
			err = errGone
		case <-ctx.Done():
			err = ctx.Err()
		}
		c.mu.Lock()
		if err != nil {
			return assignment{}, err
		}
	}
}

// beginLocked starts training when enough workers are ready, and takes a newcomer in.
func (c *coordinator) beginLocked() {
	ready := 0
	for _, m := range c.members {
		if m != nil && m.ready {
			ready++
		}
	}
	if !c.started {
		if ready < c.cfg.workers {
			return
		}
		c.started = true
		c.epochFrom = time.Now()
	}
	if c.cfg.sync && !c.open {
		c.openLocked()
	}
	c.board.setClock(c.slowestLocked())
	c.wakeLocked()
}

// pushed takes the member's next gradient out of its slot; low are the low bits of its number, as announced. An error
// means that the worker broke the rules and should be cut off.
func (c *coordinator) pushed(m *member, low uint32) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.members[m.slot] != m || c.finished {
		return nil // overtaken by its death, or by the end
	}
	clock := m.clock + 1
	if uint32(clock) != low {
		return fmt.Errorf("gradient %d announced after %d", low, m.clock)
	}
	g, err := openGradient(c.slotMemory(m.slot), clock, c.cfg.batch)
	if err != nil {
		return err
	}
	if g.base == 0 || g.base > c.version {
		return fmt.Errorf("gradient %d was computed at version %d, which does not exist yet", clock, g.base)
	}
	if c.cfg.sync {
		if m.rank < 0 || m.pushed || g.base != c.version {
			return fmt.Errorf("gradient %d, computed at version %d, was not asked for", clock, g.base)
		}
		m.clock = clock
		m.pushed, m.grad = true, g
		c.advanceLocked()
		return nil
	}
	if !c.started || m.clock-c.slowestLocked() > uint64(c.cfg.staleness) {
		return fmt.Errorf("gradient %d is further ahead than the staleness of %d allows", clock, c.cfg.staleness)
	}
	c.maxAhead = max(c.maxAhead, m.clock-c.slowestLocked())
	c.applied++
	c.sumLag += c.version - g.base
	c.maxLag = max(c.maxLag, c.version-g.base)
	m.clock = clock
	copy(c.sum, g.tensor)
	c.applyLocked(g.count, g.loss, c.cfg.batch)
	c.board.setApplied(m.slot, clock)
	c.board.setClock(c.slowestLocked())
	for c.seen >= (c.epoch+1)*c.trainSize && !c.finished {
		c.endEpochLocked()
	}
	c.wakeLocked()
	return nil
}

// slowestLocked is the clock of the slowest member. It never falls while there are any: newcomers start at it.
func (c *coordinator) slowestLocked() uint64 {
	low, any := uint64(0), false
	for _, m := range c.members {
		if m != nil && (!any || m.clock < low) {
			low, any = m.clock, true
		}
	}
	return low
}

func (c *coordinator) stepsAnEpoch() int { return (c.trainSize + c.cfg.batch - 1) / c.cfg.batch }

// openLocked opens the next step for all who are ready.
func (c *coordinator) openLocked() {
	rank := 0
	for _, m := range c.members {
		if m != nil {
			m.rank, m.pushed = -1, false
			if m.ready {
				m.rank = rank
				rank++
			}
		}
	}
	c.ranks, c.open = rank, rank > 0
}

// advanceLocked ends the step if nobody's gradient is missing, and opens the next one.
func (c *coordinator) advanceLocked() {
	if !c.open {
		return
	}
	count, loss := 0, 0.0
	for _, m := range c.members {
		if m == nil || m.rank < 0 {
			continue
		}
		if !m.pushed {
			return
		}
		count += m.grad.count
		loss += m.grad.loss
	}
	if count > 0 {
		// In the order of the slots, whoever came first: a sum of floats depends on it, and a run shall be repeatable.
		clear(c.sum)
		for _, m := range c.members {
			if m != nil && m.rank >= 0 {
				for i, v := range m.grad.tensor {
					c.sum[i] += v
				}
			}
		}
		c.applyLocked(count, loss, count)
		for _, m := range c.members {
			if m != nil && m.rank >= 0 {
				c.board.setApplied(m.slot, m.clock)
			}
		}
		c.step++
		if c.step%c.stepsAnEpoch() == 0 {
			c.endEpochLocked()
		}
	} // else all of the step's workers are dead: it is done again by those who come
	if !c.finished {
		c.openLocked()
	}
	c.wakeLocked()
}

// applyLocked makes a version of the gradient in c.sum, of count images.
func (c *coordinator) applyLocked(count int, loss float64, divisor int) {
	c.opt.apply(c.params, c.sum, divisor, float64(c.seen)/float64(c.cfg.epochs*c.trainSize))
	c.version++
	c.board.publish(c.version, c.params)
	c.images += count
	c.seen += count
	c.loss += loss
}

func (c *coordinator) endEpochLocked() {
	c.epoch++
	s := epochStat{
		epoch: c.epoch, version: c.version, accuracy: accuracy(c.params, c.heldOut), loss: c.loss / float64(max(c.images, 1)),
		maxAhead: c.maxAhead, meanLag: float64(c.sumLag) / float64(max(c.applied, 1)), maxLag: c.maxLag, elapsed: time.Since(c.epochFrom),
	}
	for _, m := range c.members {
		if m != nil && m.ready {
			s.workers++
		}
	}
	c.images, c.loss, c.epochFrom = 0, 0, time.Now()
	c.board.setEpoch(uint64(c.epoch))
	if c.epoch == c.cfg.epochs {
		c.finished = true
		c.board.setDone()
	}
	if c.onEpoch != nil {
		c.onEpoch(s)
	}
}

// done reports whether training is over, and a channel that is closed when that may have changed.
func (c *coordinator) done() (bool, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.finished, c.changed
}

// memberCount is the number of workers that have joined and not left.
func (c *coordinator) memberCount() (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range c.members {
		if m != nil {
			n++
		}
	}
	return n
}
