package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/ringside-rdma/ringside/examples/internal/device"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/rpc"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// worker computes gradients for a server.
type worker struct {
	cfg   trainConfig
	train []digit
	pause time.Duration // before each gradient, to play a slow worker

	client *rpc.Client
	data   *transport.Conn
	token  []byte
	id     int
	clock  uint64 // gradients pushed

	reader   *boardReader
	boardMR  *mr.MR // the reader's local copy
	gradMR   *mr.MR // one push, as it will lie in the slot
	boardKey transport.Remote
	slotKey  transport.Remote

	images         []int
	pulls, pushes  *hdrhistogram.Histogram
	reportedBytes  uint64
	reportedTorn   int
	pushed         uint64 // bytes since the last report
	waits          uint64 // calls of Next since then
	reportedEpochs uint64
}

// read implements boardSource: a one-sided READ, which the server's threads have no part in.
func (w *worker) read(ctx context.Context, off, n int) error {
	return w.data.Read(ctx, w.boardMR.SGE(off, n), w.boardKey, uint64(off))
}

// work joins the server at addr and computes gradients until training is over.
func work(ctx context.Context, addr string, opts *device.Options, pause time.Duration) (err error) {
	train, _, err := loadDigits()
	if err != nil {
		return err
	}
	dev, err := opts.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	w := &worker{train: train, pause: pause, pulls: newHistogram(), pushes: newHistogram(), token: make([]byte, tokenBytes)}
	rand.Read(w.token)
	w.boardMR, err = mr.Alloc(dev.PD(), boardBytes, ib.AccessLocalWrite)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.boardMR.Close()) }()
	w.gradMR, err = mr.Alloc(dev.PD(), bufferBytes, ib.AccessLocalWrite)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.gradMR.Close()) }()

	w.client, err = rpc.Dial(ctx, addr, dev.Config("worker"), nil)
	if err != nil {
		return err
	}
	defer w.client.Close()
	cfg := dev.Config("worker data")
	cfg.PrivateData = w.token
	w.data, err = transport.Dial(ctx, addr, cfg)
	if err != nil {
		return err
	}
	defer w.data.Close()
	if err := w.join(ctx); err != nil {
		if rpc.CodeOf(err) == rpc.OutOfRange {
			return nil // we come too late, all is done
		}
		return err
	}
	if w.cfg.sync {
		err = w.runSync(ctx)
	} else {
		err = w.runStale(ctx)
	}
	if err == nil {
		err = w.report(ctx)
	}
	return err
}

func (w *worker) join(ctx context.Context) error {
	d, err := rpc.Invoke[*DescribeReply](ctx, w.client, methodDescribe, &DescribeRequest{})
	if err != nil {
		return fmt.Errorf("describe: %w", err)
	}
	if d.Parameters != paramCount {
		return fmt.Errorf("the server trains a model of %d parameters, and this worker one of %d", d.Parameters, paramCount)
	}
	w.cfg = trainConfig{
		workers: int(d.Workers), sync: d.Sync, staleness: int(d.Staleness), epochs: int(d.Epochs), batch: int(d.Batch),
		rate: 1, seed: d.Seed, // the rate is the server's affair
	}
	if err := w.cfg.check(); err != nil {
		return fmt.Errorf("the server's configuration: %w", err)
	}
	j, err := rpc.Invoke[*JoinReply](ctx, w.client, methodJoin, &JoinRequest{Token: w.token})
	if err != nil {
		return fmt.Errorf("join: %w", err)
	}
	if j.Slot >= maxSlots {
		return fmt.Errorf("join: the server gave slot %d of %d", j.Slot, maxSlots)
	}
	if err := w.boardKey.UnmarshalBinary(j.BoardRegion); err != nil {
		return fmt.Errorf("join: board: %w", err)
	}
	if err := w.slotKey.UnmarshalBinary(j.GradientRegion); err != nil {
		return fmt.Errorf("join: slot: %w", err)
	}
	w.id, w.clock = int(j.Worker), j.Clock
	w.reader = newBoardReader(w, w.boardMR.Bytes(), int(j.Slot))
	return nil
}

// next waits at the server's barrier.
func (w *worker) next(ctx context.Context) (assignment, error) {
	w.waits++
	n, err := rpc.Invoke[*NextReply](ctx, w.client, methodNext, &NextRequest{Token: w.token, Clock: w.clock})
	if err != nil {
		return assignment{}, fmt.Errorf("next: %w", err)
	}
	a := assignment{done: n.Done, version: n.Version, epoch: int(n.Epoch), batch: int(n.Batch), rank: int(n.Rank), of: int(n.Of)}
	if w.cfg.sync && !a.done && (a.of < 1 || a.rank >= a.of || a.batch > len(w.train)/w.cfg.batch) {
		return a, fmt.Errorf("next: the server's assignment makes no sense: %+v", a)
	}
	return a, nil
}

// pull reads the newest parameters and measures how long it takes until they are known to be whole.
func (w *worker) pull(ctx context.Context) (boardHeader, []float32, error) {
	start := time.Now()
	h, params, err := w.reader.pull(ctx)
	if err != nil {
		return h, nil, fmt.Errorf("pull: %w", err)
	}
	record(w.pulls, time.Since(start))
	return h, params, nil
}

// push computes the next gradient into registered memory, right where it is sent from, and writes it into our slot.
func (w *worker) push(ctx context.Context, params []float32, version uint64, a assignment) error {
	if w.pause > 0 {
		select {
		case <-time.After(w.pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	clock := w.clock + 1
	w.images = batchImages(w.images[:0], &w.cfg, len(w.train), a, w.id, clock)
	buf := w.gradMR.Bytes()
	loss := computeGradient(floats(buf[prefixBytes:][:tensorBytes]), params, w.train, w.images)
	sealGradient(buf, clock, version, len(w.images), loss)

	const n = prefixBytes + tensorBytes
	start := time.Now()
	if err := w.data.WriteImm(ctx, w.gradMR.SGE(0, n), w.slotKey, clock%2*bufferBytes, uint32(clock)); err != nil {
		return fmt.Errorf("push: %w", err)
	}
	record(w.pushes, time.Since(start))
	w.clock = clock
	w.pushed += n
	return nil
}

func record(h *hdrhistogram.Histogram, d time.Duration) {
	h.RecordValue(min(max(int64(d), 1), h.HighestTrackableValue()))
}

// runSync takes part in steps: barrier, pull, push.
func (w *worker) runSync(ctx context.Context) error {
	for {
		a, err := w.next(ctx)
		if err != nil || a.done {
			return err
		}
		h, params, err := w.pull(ctx)
		if err != nil {
			return err
		}
		if h.published != a.version {
			return fmt.Errorf("pull: version %d, but the step is computed at %d", h.published, a.version)
		}
		if err := w.push(ctx, params, h.published, a); err != nil {
			return err
		}
		if err := w.reportEpoch(ctx, h.epoch); err != nil {
			return err
		}
	}
}

// runStale pulls and pushes with no call at all, as long as the board says that nobody is left behind.
func (w *worker) runStale(ctx context.Context) error {
	if a, err := w.next(ctx); err != nil || a.done { // says that we are ready
		return err
	}
	for {
		h, params, err := w.pull(ctx)
		if err != nil {
			return err
		}
		if h.done {
			return nil
		}
		// Too far ahead of the slowest, or the buffer that is next in turn is not read yet: wait, and look again.
		if w.clock > h.clock+uint64(w.cfg.staleness) || w.clock > h.applied+1 {
			if a, err := w.next(ctx); err != nil || a.done {
				return err
			}
			continue
		}
		if err := w.push(ctx, params, h.published, assignment{}); err != nil {
			return err
		}
		if err := w.reportEpoch(ctx, h.epoch); err != nil {
			return err
		}
	}
}

func (w *worker) reportEpoch(ctx context.Context, epochs uint64) error {
	if epochs == w.reportedEpochs {
		return nil
	}
	w.reportedEpochs = epochs
	return w.report(ctx)
}

// report tells the server what was done since the last report, so that a worker that is killed loses an epoch's at most.
func (w *worker) report(ctx context.Context) error {
	pulls, err := w.pulls.Encode(hdrhistogram.V2CompressedEncodingCookieBase)
	if err != nil {
		return err
	}
	pushes, err := w.pushes.Encode(hdrhistogram.V2CompressedEncodingCookieBase)
	if err != nil {
		return err
	}
	path := w.data.Path()
	_, err = rpc.Invoke[*ReportReply](ctx, w.client, methodReport, &ReportRequest{
		Token: w.token, Device: path.Device, Path: path.Rung, PulledBytes: w.reader.bytes - w.reportedBytes, PushedBytes: w.pushed,
		Torn: uint64(w.reader.torn - w.reportedTorn), Pulls: pulls, Pushes: pushes, Waits: w.waits,
	})
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	w.reportedBytes, w.reportedTorn, w.pushed, w.waits = w.reader.bytes, w.reader.torn, 0, 0
	w.pulls.Reset()
	w.pushes.Reset()
	return nil
}
