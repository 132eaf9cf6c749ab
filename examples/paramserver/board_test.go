package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// hostileSource reads shared words one by one, in an order of its own, and lets the writer run in between: what a
// device may do within one READ, at its worst.
type hostileSource struct {
	board, local []atomic.Uint64
	between      func() // called between words
	rng          *rand.Rand
}

func (s *hostileSource) read(_ context.Context, off, n int) error {
	order := s.rng.Perm((n + 7) / 8)
	for _, i := range order {
		if s.between != nil {
			s.between()
		}
		s.local[off/8+i].Store(s.board[off/8+i].Load())
	}
	return nil
}

func newBoardPair(seed uint64) (boardWriter, *hostileSource, *boardReader) {
	board, local := make([]atomic.Uint64, boardBytes/8), make([]byte, boardBytes)
	src := &hostileSource{board: board, local: words(local), rng: rand.New(rand.NewPCG(seed, 1))}
	return boardWriter{board}, src, newBoardReader(src, local, 3)
}

// patterned is a tensor in which every value tells its version.
func patterned(v uint64) []float32 {
	p := make([]float32, paramCount)
	for i := range p {
		p[i] = float32(v*4096 + uint64(i))
	}
	return p
}

func checkPattern(t *testing.T, v uint64, p []float32) {
	t.Helper()
	for i := range p {
		if p[i] != float32(v*4096+uint64(i)) {
			t.Fatalf("torn: version %d, value %d is %v", v, i, p[i])
		}
	}
}

func TestPull(t *testing.T) {
	b, _, r := newBoardPair(1)
	ctx := context.Background()
	if _, _, err := r.pull(ctx); !errors.Is(err, errNotPublished) {
		t.Fatalf("empty board: %v", err)
	}
	for v := uint64(1); v < 5; v++ {
		b.publish(v, patterned(v))
		b.setApplied(3, v*10)
		b.setClock(v * 100)
		h, p, err := r.pull(ctx)
		if err != nil || h.published != v || h.applied != v*10 || h.clock != v*100 || h.done {
			t.Fatalf("version %d: %+v, %v", v, h, err)
		}
		checkPattern(t, v, p)
	}
	b.setDone()
	if h, _, err := r.pull(ctx); err != nil || !h.done || r.torn != 0 {
		t.Fatalf("%+v torn %d: %v", h, r.torn, err)
	}
}

// The writer is moved on between any two words of the reader's copying, from "a little slower than the reader" to "so
// fast that no snapshot can be had", with seeds. What pull returns is never torn, and it does give up in the end.
func TestNoTornSnapshotInterleaved(t *testing.T) {
	for seed := range uint64(6) {
		if raceEnabled && seed > 1 {
			break // one goroutine, after all
		}
		b, src, r := newBoardPair(seed)
		v := uint64(1)
		b.publish(v, patterned(v))
		// The writer's stores, one a step, so that readers see every intermediate state.
		var pending []func()
		step := func() {
			if len(pending) == 0 {
				v++
				params, buf := patterned(v), bufferOffset(v)
				scratch := boardWriter{make([]atomic.Uint64, boardBytes/8)}
				scratch.publish(v, params)
				pending = append(pending, func() { b.w[wordBegun].Store(v) })
				for i := range bufferBytes / 8 {
					pending = append(pending, func() { b.w[buf/8+i].Store(scratch.w[buf/8+i].Load()) })
				}
				pending = append(pending, func() { b.w[wordPublished].Store(v) })
			}
			pending[0]()
			pending = pending[1:]
		}
		rng := rand.New(rand.NewPCG(seed, 2))
		speed := []float64{0.3, 0.7, 0.9, 1.1, 1.3, 1.5}[seed] // writer's steps a word read
		src.between = func() {
			for n := speed; n > rng.Float64(); n-- {
				step()
			}
		}
		good := 0
		for range 40 {
			h, p, err := r.pull(context.Background())
			if errors.Is(err, errTorn) {
				break
			}
			if err != nil {
				t.Fatal(err) // a wrong checksum here would mean that the version check let something through
			}
			checkPattern(t, h.published, p)
			good++
		}
		t.Logf("writer at %.1f x the reader's speed: %d whole, %d torn and refused", speed, good, r.torn)
		if speed < 0.5 && r.torn > good {
			t.Errorf("a slow writer spoilt %d of %d pulls", r.torn, good)
		}
		if speed > 1 && r.torn == 0 {
			t.Error("a fast writer tore nothing: the test does not test")
		}
	}
}

// A real goroutine that never stops publishing races with readers.
func TestNoTornSnapshotRacing(t *testing.T) {
	board := make([]atomic.Uint64, boardBytes/8)
	w := boardWriter{board}
	w.publish(1, patterned(1))
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for v := uint64(2); !stop.Load(); v++ {
			w.publish(v, patterned(v%1000)) // float32 holds v*4096+i exactly up to here
		}
	})
	for seed := range uint64(2) {
		local := make([]byte, boardBytes)
		r := newBoardReader(&hostileSource{board: board, local: words(local), rng: rand.New(rand.NewPCG(seed, 3))}, local, 0)
		for pulls := 0; pulls < 100 && r.torn < 300; pulls++ {
			h, p, err := r.pull(context.Background())
			if errors.Is(err, errTorn) {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			checkPattern(t, h.published%1000, p)
		}
		t.Logf("%d torn and refused", r.torn)
	}
	stop.Store(true)
	wg.Wait()
}

// A device that tears a buffer without the header's telling is caught by the checksum.
func TestChecksumIsASecondNet(t *testing.T) {
	b, _, r := newBoardPair(1)
	b.publish(1, patterned(1))
	b.w[bufferOffset(1)/8+100].Add(1)
	if _, _, err := r.pull(context.Background()); !errors.Is(err, errChecksum) {
		t.Fatalf("got %v", err)
	}
}

func TestGradientSlot(t *testing.T) {
	slot := make([]byte, slotBytes)
	seal := func(clock uint64) []byte {
		buf := slot[int(clock%2)*bufferBytes:][:bufferBytes]
		copy(floats(buf[prefixBytes:][:tensorBytes]), patterned(clock))
		sealGradient(buf, clock, clock+7, 16, 1.5)
		return buf
	}
	for clock := uint64(1); clock < 4; clock++ {
		seal(clock)
		g, err := openGradient(slot, clock, 48)
		if err != nil || g.count != 16 || g.loss != 1.5 || g.base != clock+7 {
			t.Fatalf("%+v, %v", g, err)
		}
		checkPattern(t, clock, g.tensor)
	}
	for name, spoil := range map[string]func(buf []byte){
		"announced": func(buf []byte) { words(buf[:8])[0].Store(77) },
		"checksum":  func(buf []byte) { buf[prefixBytes+9]++ },
		"images":    func(buf []byte) { sealGradient(buf, 5, 1, 49, 1) },
		"not finite": func(buf []byte) {
			nan := floats(buf[prefixBytes:][:4])
			nan[0] -= nan[0]
			nan[0] /= nan[0]
			sealGradient(buf, 5, 1, 9, 1)
		},
	} {
		spoil(seal(5))
		if _, err := openGradient(slot, 5, 48); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
