package main

import (
	"bytes"
	"fmt"
	"time"
)

// A perftestLayout is how perftest uses its memory: a half that it sends from, and a half that the peer reads and writes. In
// bandwidth tests small messages go through a cycle of it, a cache line or more apart; all others stay at the start of a half.
type perftestLayout struct {
	size, cycle, line int // bytes: of a message, and what was agreed on
	moves             bool
}

func newPerftestLayout(size int, agreed perftestIntro, bandwidth bool) perftestLayout {
	return perftestLayout{size, agreed.cycle, agreed.line, bandwidth && size <= agreed.cycle/2}
}

// half is where the second half begins.
func (l perftestLayout) half() int { return max(l.size, l.cycle) }

// whole is the length of the memory.
func (l perftestLayout) whole() int { return 2 * roundUp(l.half(), l.line) }

// step is how far messages of a cycle are apart.
func (l perftestLayout) step() int { return roundUp(max(l.size, l.line), l.line) }

// places is how many messages a cycle has.
func (l perftestLayout) places() int {
	if !l.moves {
		return 1
	}
	return l.cycle / l.step()
}

// at is the offset of message i in a half.
func (l perftestLayout) at(i int) int { return i % l.places() * l.step() }

func roundUp(n, unit int) int { return (n + unit - 1) / unit * unit }

// glibcRand writes what successive calls of rand(3) return, by the GNU C library, as chars, after srand(seed).
func glibcRand(seed uint32, b []byte) {
	const lag, back, warm = 31, 3, 310
	var r [lag]uint32
	if seed == 0 {
		seed = 1
	}
	r[0] = seed
	for i, v := 1, int64(int32(seed)); i < lag; i++ {
		if v = 16807 * v % 0x7fffffff; v < 0 {
			v += 0x7fffffff
		}
		r[i] = uint32(v)
	}
	// r[(n)%31] is what came 31 numbers ago. The first 31+3 numbers of the sequence are the state itself and 3 of it again.
	next := func(n int) uint32 {
		r[n%lag] += r[(n+lag-back)%lag]
		return r[n%lag]
	}
	n := back
	for range warm {
		next(n)
		n++
	}
	for i := range b {
		b[i] = byte(next(n) >> 1)
		n++
	}
}

// How far back and ahead of this clock the peer may have filled its memory.
const (
	seedsBack  = 120
	seedsAhead = 5
)

// perftestContent finds out what is in a peer's memory of n bytes, given what some of it is, at one of the offsets: perftest fills
// it from rand(3), which it seeds by the time in seconds.
func perftestContent(n int, sample []byte, offsets []int, now time.Time) ([]byte, error) {
	b := make([]byte, n)
	for back := -seedsAhead; back <= seedsBack; back++ {
		glibcRand(uint32(now.Unix()-int64(back)), b)
		for _, at := range offsets {
			if bytes.Equal(b[at:at+len(sample)], sample) {
				return b, nil
			}
		}
	}
	return nil, fmt.Errorf("%x... is not what perftest has filled its memory with in the last %d s; without -c nobody looks",
		sample[:min(16, len(sample))], seedsBack)
}
