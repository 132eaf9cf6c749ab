package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"sync/atomic"
)

// The board is the region of the server that workers read one-sided. It holds the current parameters and the one
// before them, so that publishing does not disturb a worker that is still reading:
//
//	header   begun      the version whose storing has begun last
//	         published  the version that is complete
//	         clock      gradients pushed by the slowest worker (bounded staleness)
//	         epoch      epochs finished
//	         done       1: training is over
//	         applied    a word a slot: how many gradients of that slot's worker the server is through with
//	buffer 0 version, checksum, tensor        for even versions
//	buffer 1 version, checksum, tensor        for odd versions
//
// A version is stored in this order: begun, the buffer, published. A worker reads in this order, each READ waited for
// before the next is posted: header (published = v), buffer v%2, header. If begun is still less than v+2, nobody had
// started to overwrite the buffer when the last byte of it was read, so what was read is version v, whole. If not, the
// snapshot is thrown away and the pull starts again. No order of bytes within one READ is assumed: none is promised.
// The checksum is a second net, for a bug or a device that breaks the rules.
const (
	wordBegun     = 0
	wordPublished = 1
	wordClock     = 2
	wordEpoch     = 3
	wordDone      = 4
	wordApplied   = 8 // one word a slot

	maxSlots     = 56
	headerBytes  = (wordApplied + maxSlots) * 8
	prefixBytes  = 64 // of a buffer: version, checksum, padding up to the tensor's cache line
	tensorBytes  = paramCount * 4
	bufferBytes  = (prefixBytes + tensorBytes + 63) &^ 63
	boardBytes   = headerBytes + 2*bufferBytes
	maxPullTries = 100 // torn snapshots in a row before a pull gives up
)

// bufferOffset is where the board keeps version v.
func bufferOffset(v uint64) int { return headerBytes + int(v%2)*bufferBytes }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksum covers a tensor and the number that goes with it: a version, or a worker's clock.
func checksum(tensor []byte, tag uint64) uint64 {
	return uint64(crc32.Checksum(tensor, castagnoli)) | tag<<32
}

// boardWriter is the server's side of the board. Its methods must not be called concurrently.
type boardWriter struct {
	w []atomic.Uint64
}

// publish stores params as version v, which must be one more than the version before.
//
// Every store is atomic. The peers' loads are done by their device, outside of Go's memory model; on our side
// sequentially consistent stores become visible in program order on every architecture, which plain stores between
// two atomic ones would not (on arm64 a later plain store may pass an earlier release store).
func (b boardWriter) publish(v uint64, params []float32) {
	b.w[wordBegun].Store(v) // pairs with the header's second READ in boardReader.pull
	buf := b.w[bufferOffset(v)/8:][:bufferBytes/8]
	buf[0].Store(v)
	buf[1].Store(checksum(bytesOf(params), v))
	tensor := buf[prefixBytes/8:]
	for i := 0; i < len(params); i += 2 {
		word := uint64(math.Float32bits(params[i]))
		if i+1 < len(params) {
			word |= uint64(math.Float32bits(params[i+1])) << 32
		}
		tensor[i/2].Store(word)
	}
	b.w[wordPublished].Store(v) // pairs with the header's first READ
}

func (b boardWriter) setClock(c uint64)             { b.w[wordClock].Store(c) }
func (b boardWriter) setEpoch(e uint64)             { b.w[wordEpoch].Store(e) }
func (b boardWriter) setDone()                      { b.w[wordDone].Store(1) }
func (b boardWriter) setApplied(slot int, n uint64) { b.w[wordApplied+slot].Store(n) }

// boardHeader is a worker's copy of the header.
type boardHeader struct {
	published uint64
	clock     uint64
	epoch     uint64
	done      bool
	applied   uint64 // of the slot that was asked for
}

// boardSource reads the board of a server: n bytes at its offset off to offset off of the local copy, and returns when
// they are there. A worker's is a one-sided READ; tests have treacherous ones.
type boardSource interface {
	read(ctx context.Context, off, n int) error
}

// boardReader is a worker's side of the board: a local copy, in registered memory of boardBytes, that READs fill. It
// belongs to one goroutine.
type boardReader struct {
	src   boardSource
	local []byte
	w     []atomic.Uint64
	slot  int

	reads int    // READs of the pulls so far
	bytes uint64 // bytes they have brought
	torn  int    // snapshots thrown away because the server overwrote them meanwhile
}

func newBoardReader(src boardSource, local []byte, slot int) *boardReader {
	return &boardReader{src: src, local: local, w: words(local), slot: slot}
}

func (r *boardReader) fetch(ctx context.Context, off, n int) error {
	if err := r.src.read(ctx, off, n); err != nil {
		return err
	}
	r.reads++
	r.bytes += uint64(n)
	return nil
}

// header reads the header alone: one READ.
func (r *boardReader) header(ctx context.Context) (boardHeader, error) {
	if err := r.fetch(ctx, 0, headerBytes); err != nil {
		return boardHeader{}, err
	}
	return boardHeader{
		published: r.w[wordPublished].Load(),
		clock:     r.w[wordClock].Load(),
		epoch:     r.w[wordEpoch].Load(),
		done:      r.w[wordDone].Load() != 0,
		applied:   r.w[wordApplied+r.slot].Load(),
	}, nil
}

var (
	errNotPublished = errors.New("the server has published no parameters yet")
	errTorn         = errors.New("the server keeps overwriting the parameters while they are read")
	errChecksum     = errors.New("parameters that should be whole have a wrong checksum")
)

// pull reads the newest parameters, three READs if nothing gets in between. The tensor is lent until the next pull: it
// lies where the READ has put it. A torn snapshot is read again, never returned.
func (r *boardReader) pull(ctx context.Context) (boardHeader, []float32, error) {
	for range maxPullTries {
		h, err := r.header(ctx)
		if err != nil {
			return h, nil, err
		}
		v := h.published
		if v == 0 {
			return h, nil, errNotPublished
		}
		off := bufferOffset(v)
		if err := r.fetch(ctx, off, prefixBytes+tensorBytes); err != nil {
			return h, nil, err
		}
		if err := r.fetch(ctx, wordBegun*8, 8); err != nil {
			return h, nil, err
		}
		if r.w[wordBegun].Load() >= v+2 {
			r.torn++
			continue
		}
		tensor := r.local[off+prefixBytes:][:tensorBytes]
		if got := r.w[off/8].Load(); got != v || r.w[off/8+1].Load() != checksum(tensor, v) {
			return h, nil, fmt.Errorf("%w: version %d, found %d", errChecksum, v, got)
		}
		return h, floats(tensor), nil
	}
	return boardHeader{}, nil, errTorn
}

// A worker pushes gradients into its own slot of another region of the server, by one WRITE WITH IMMEDIATE that brings
// the gradient and wakes the server. A slot has two buffers, used in turns, so that a worker need not wait until its
// last gradient has been applied: only until the one before it has.
const (
	gradClock    = 0 // words of a gradient's prefix: the worker's count of pushes, this one included
	gradCount    = 1 // images that it is the sum of
	gradLoss     = 2 // their losses' sum, float64 bits
	gradBase     = 3 // version of the parameters it was computed at
	gradChecksum = 4

	slotBytes = 2 * bufferBytes
)

// gradient is one push, as the server finds it in a slot.
type gradient struct {
	clock, base uint64
	count       int
	loss        float64
	tensor      []float32
}

// sealGradient fills in the prefix of a gradient whose tensor is already in buf.
func sealGradient(buf []byte, clock, base uint64, count int, loss float64) {
	w := words(buf[:prefixBytes])
	w[gradClock].Store(clock)
	w[gradCount].Store(uint64(count))
	w[gradLoss].Store(math.Float64bits(loss))
	w[gradBase].Store(base)
	w[gradChecksum].Store(checksum(buf[prefixBytes:][:tensorBytes], clock))
}

// openGradient reads the push number clock out of a slot. The notification came after the bytes, so they are all
// there; what a worker claims is checked all the same, on a copy: it can write to its slot at any time.
func openGradient(slot []byte, clock uint64, maxCount int) (gradient, error) {
	buf := bytes.Clone(slot[int(clock%2)*bufferBytes:][:bufferBytes])
	w := words(buf[:prefixBytes])
	tensor := buf[prefixBytes:][:tensorBytes]
	g := gradient{clock: w[gradClock].Load(), base: w[gradBase].Load(), tensor: floats(tensor)}
	count := w[gradCount].Load()
	g.loss = math.Float64frombits(w[gradLoss].Load())
	switch {
	case g.clock != clock:
		return g, fmt.Errorf("gradient %d announced, but %d found in the slot", clock, g.clock)
	case count > uint64(maxCount):
		return g, fmt.Errorf("gradient %d claims to be of %d images, more than the batch of %d", clock, count, maxCount)
	case w[gradChecksum].Load() != checksum(tensor, clock):
		return g, fmt.Errorf("gradient %d has a wrong checksum", clock)
	case math.IsNaN(g.loss) || math.IsInf(g.loss, 0):
		return g, fmt.Errorf("gradient %d has no finite loss", clock)
	}
	for _, v := range g.tensor {
		if v != v || v > math.MaxFloat32 || v < -math.MaxFloat32 {
			return g, fmt.Errorf("gradient %d holds a number that is not finite", clock)
		}
	}
	g.count = int(count)
	return g, nil
}
