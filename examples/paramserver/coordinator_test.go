package main

import (
	"context"
	"errors"
	"math"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// memSource is the board read with no device: tests of training need no network.
type memSource struct{ board, local []atomic.Uint64 }

func (s memSource) read(_ context.Context, off, n int) error {
	for i := off / 8; i < (off+n+7)/8; i++ {
		s.local[i].Store(s.board[i].Load())
	}
	return nil
}

type testJob struct {
	*coordinator
	train []digit
	board []byte
	stats []epochStat
}

func newTestJob(t *testing.T, cfg trainConfig) *testJob {
	t.Helper()
	train, heldOut, err := loadDigits()
	if err != nil {
		t.Fatal(err)
	}
	if cfg.rate == 0 {
		cfg.rate, cfg.momentum = defaultRate, defaultMomentum
	}
	if err := cfg.check(); err != nil {
		t.Fatal(err)
	}
	j := &testJob{train: train, board: make([]byte, boardBytes)}
	j.coordinator = newCoordinator(cfg, len(train), heldOut, j.board, make([]byte, maxSlots*slotBytes), func(s epochStat) {
		j.stats = append(j.stats, s)
	})
	return j
}

// work is a worker without a network. It dies, if die says so, in the middle of a gradient. slow is called between pull and push.
func (j *testJob) work(t *testing.T, die func(pushes int) bool, slow func()) {
	m, clock, err := j.join()
	if err != nil {
		if !errors.Is(err, errOver) {
			t.Error(err)
		}
		return
	}
	defer j.leave(m)
	local := make([]byte, boardBytes)
	r := newBoardReader(memSource{words(j.board), words(local)}, local, m.slot)
	var images []int
	for pushes := 0; ; pushes++ {
		a, err := j.next(context.Background(), m, clock)
		if err != nil {
			t.Error(err)
			return
		}
		if a.done {
			return
		}
		h, params, err := r.pull(context.Background())
		if err != nil {
			t.Error(err)
			return
		}
		if j.cfg.sync && h.published != a.version {
			t.Errorf("pulled version %d, want %d", h.published, a.version)
		}
		if slow != nil {
			slow()
		}
		clock++
		images = batchImages(images[:0], &j.cfg, len(j.train), a, m.id, clock)
		buf := j.slotMemory(m.slot)[int(clock%2)*bufferBytes:][:bufferBytes]
		loss := computeGradient(floats(buf[prefixBytes:][:tensorBytes]), params, j.train, images)
		sealGradient(buf, clock, h.published, len(images), loss)
		if die != nil && die(pushes) {
			return
		}
		if err := j.pushed(m, uint32(clock)); err != nil {
			t.Error(err)
			return
		}
	}
}

func (j *testJob) final(t *testing.T) epochStat {
	t.Helper()
	if len(j.stats) != j.cfg.epochs {
		t.Fatalf("%d epochs done, want %d", len(j.stats), j.cfg.epochs)
	}
	return j.stats[len(j.stats)-1]
}

// Synchronous training gives the same model, bit for bit, however the workers are scheduled; and the same accuracy,
// but for rounding, with any number of them.
func TestSyncIsDeterministic(t *testing.T) {
	var first []float32
	epochs := 3
	if raceEnabled {
		epochs = 1
	}
	for range 3 {
		j := newTestJob(t, trainConfig{workers: 3, sync: true, epochs: epochs, batch: defaultBatch, seed: 1})
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() { j.work(t, nil, runtime.Gosched) })
		}
		wg.Wait()
		j.final(t)
		if first == nil {
			first = j.params
			continue
		}
		for i := range first {
			if first[i] != j.params[i] {
				t.Fatalf("parameter %d differs between runs: %v, %v", i, first[i], j.params[i])
			}
		}
	}
}

func TestTrainInProcess(t *testing.T) {
	for name, cfg := range map[string]trainConfig{
		"sync":        {workers: 3, sync: true, epochs: 10, batch: defaultBatch},
		"staleness 0": {workers: 3, staleness: 0, epochs: 10, batch: defaultBatch},
		"staleness 4": {workers: 4, staleness: 4, epochs: 10, batch: defaultBatch},
	} {
		t.Run(name, func(t *testing.T) {
			j := newTestJob(t, cfg)
			var wg sync.WaitGroup
			for i := range cfg.workers {
				slow := runtime.Gosched
				if i == 0 && !cfg.sync { // one is slower than the others, which run into the bound
					slow = func() { time.Sleep(100 * time.Microsecond) }
				}
				wg.Go(func() { j.work(t, nil, slow) })
			}
			wg.Wait()
			s := j.final(t)
			if s.accuracy < 0.93 || s.maxAhead > uint64(cfg.staleness) {
				t.Errorf("%+v", s)
			}
			t.Logf("accuracy %.3f, at most %d ahead, %.1f versions late", s.accuracy, s.maxAhead, s.meanLag)
		})
	}
}

// Workers die at any point and are replaced; training goes on and gets there.
func TestDeathsAndReplacements(t *testing.T) {
	for name, sync := range map[string]bool{"sync": true, "stale": false} {
		t.Run(name, func(t *testing.T) {
			j := newTestJob(t, trainConfig{workers: 3, sync: sync, staleness: 2, epochs: 10, batch: defaultBatch})
			var deaths atomic.Int32
			finish := make(chan struct{}, 3)
			for i := range 3 {
				go func() {
					for life := 0; ; life++ {
						if over, _ := j.done(); over {
							break
						}
						j.work(t, func(pushes int) bool {
							if i == 0 || life > 5 || pushes < 7+5*i {
								return false
							}
							deaths.Add(1)
							return true
						}, runtime.Gosched)
					}
					finish <- struct{}{}
				}()
			}
			for range 3 {
				<-finish
			}
			s := j.final(t)
			if s.accuracy < 0.93 || deaths.Load() == 0 {
				t.Errorf("%d deaths, %+v", deaths.Load(), s)
			}
			t.Logf("%d deaths, accuracy %.3f", deaths.Load(), s.accuracy)
		})
	}
}

// All workers of a synchronous step die: it is done again by their replacements.
func TestWholeStepDies(t *testing.T) {
	j := newTestJob(t, trainConfig{workers: 2, sync: true, epochs: 1, batch: 700})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() { j.work(t, func(int) bool { return true }, nil) })
	}
	wg.Wait()
	if n := j.memberCount(); n != 0 {
		t.Fatalf("%d members left", n)
	}
	j.work(t, nil, nil)
	if s := j.final(t); s.version != 4 { // 1,438 images are 3 steps
		t.Fatalf("%+v", s)
	}
}

// A worker that changes its gradient after it was checked, while the step waits for the others, changes nothing.
func TestGradientChangedLater(t *testing.T) {
	j := newTestJob(t, trainConfig{workers: 2, sync: true, epochs: 1, batch: 10})
	var members [2]*member
	for i := range members {
		m, _, err := j.join()
		if err != nil {
			t.Fatal(err)
		}
		m.ready = true
		members[i] = m
	}
	j.mu.Lock()
	j.beginLocked()
	j.mu.Unlock()
	for _, m := range members {
		buf := j.slotMemory(m.slot)[bufferBytes:]
		sealGradient(buf, 1, 1, 5, 1)
		if err := j.pushed(m, 1); err != nil {
			t.Fatal(err)
		}
		floats(buf[prefixBytes:][:tensorBytes])[0] = float32(math.NaN())
	}
	if j.version != 2 || j.params[0] != j.params[0] {
		t.Errorf("version %d has %v", j.version, j.params[0])
	}
}

func TestCoordinatorRefuses(t *testing.T) {
	j := newTestJob(t, trainConfig{workers: 1, sync: true, epochs: 1, batch: 10})
	m, clock, err := j.join()
	if err != nil || clock != 0 {
		t.Fatal(clock, err)
	}
	buf := j.slotMemory(m.slot)[bufferBytes:]
	push := func(want string, seal func()) {
		t.Helper()
		seal()
		if err := j.pushed(m, 1); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
	push("was not asked for", func() { sealGradient(buf, 1, 1, 10, 1) })
	if _, err := j.next(context.Background(), m, clock); err != nil {
		t.Fatal(err)
	}
	push("does not exist", func() { sealGradient(buf, 1, 2, 10, 1) })
	push("more than the batch", func() { sealGradient(buf, 1, 1, 11, 1) })
	if err := j.pushed(m, 2); err == nil {
		t.Error("a gradient out of turn was taken")
	}
	for range maxSlots - 1 {
		if _, _, err := j.join(); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := j.join(); !errors.Is(err, errFull) {
		t.Errorf("one too many: %v", err)
	}

	// A waiting barrier ends with its context and with its member.
	ctx, cancel := context.WithCancel(context.Background())
	sealGradient(buf, 1, 1, 10, 1)
	other := j.members[1]
	time.AfterFunc(time.Millisecond, cancel)
	if _, err := j.next(ctx, other, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled barrier: %v", err)
	}
	time.AfterFunc(time.Millisecond, func() { j.leave(other) })
	if _, err := j.next(context.Background(), other, 0); !errors.Is(err, errGone) {
		t.Errorf("dead member's barrier: %v", err)
	}
	for _, cfg := range []trainConfig{{}, {workers: 1}, {workers: 2, epochs: 1, batch: 1}, {workers: 1, epochs: 1, batch: 1, staleness: -1}, {workers: 1, epochs: 1, batch: 1}, {workers: 57, epochs: 1, batch: 99}} {
		if cfg.check() == nil {
			t.Errorf("%+v was accepted", cfg)
		}
	}
}
