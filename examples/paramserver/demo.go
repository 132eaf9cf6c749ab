package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"

	"github.com/ringside-rdma/ringside/examples/internal/spawn"
)

// listeningPrefix begins the line in which a server tells its address.
const listeningPrefix = "listening on "

// maxReplacements bounds how often a worker that died by itself is replaced: what fails always shall not go on for ever.
const maxReplacements = 10

// demo runs a server and its workers as processes, and replaces workers that die.
func demo(ctx context.Context, o *options, stdout, stderr io.Writer) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	common := append([]string{"-child"}, o.device.Args()...)
	server, err := spawn.Start(ctx, stderr, append(common, "-listen", "127.0.0.1:0", "-mode", o.mode,
		"-workers", strconv.Itoa(o.train.workers), "-staleness", strconv.Itoa(o.train.staleness),
		"-epochs", strconv.Itoa(o.train.epochs), "-batch", strconv.Itoa(o.train.batch), "-seed", strconv.FormatUint(o.train.seed, 10),
		"-rate", fmt.Sprint(o.train.rate), "-momentum", fmt.Sprint(o.train.momentum))...)
	if err != nil {
		return err
	}
	defer server.Stop()
	d := &crew{ctx: ctx, fail: cancel, stderr: stderr, say: func(format string, args ...any) { fmt.Fprintf(stdout, format, args...) }}
	defer d.stop()

	result := ""
	for {
		line, err := server.Line()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if addr, ok := strings.CutPrefix(line, listeningPrefix); ok {
			d.args = append(common, "-connect", addr, "-pause", o.pause.String())
			for i := range o.train.workers {
				var extra []string
				if i == 0 {
					extra = []string{"-pause", (2 * o.pause).String()} // the later flag counts
				}
				if err := d.start(extra...); err != nil {
					return err
				}
			}
		}
		if strings.HasPrefix(line, resultPrefix) {
			result = line // must be the very last
			continue
		}
		d.mu.Lock()
		fmt.Fprintln(stdout, line)
		d.mu.Unlock()
		if e, err := parseEpoch(line); err == nil {
			switch e.epoch {
			case o.train.epochs:
				d.over()
			case o.kill:
				d.killOne()
			}
		}
	}
	if err := server.Wait(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("the server: %w", err)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if result == "" {
		return errors.New("the server ended without a result")
	}
	d.wait()
	_, err = fmt.Fprintln(stdout, result)
	return err
}

// crew is the demo's workers.
type crew struct {
	ctx    context.Context
	fail   context.CancelCauseFunc // ends the demo
	stderr io.Writer
	args   []string
	say    func(format string, args ...any)

	mu       sync.Mutex
	wg       sync.WaitGroup
	workers  []*spawn.Process
	stopping bool
	replaced int
}

// start starts a worker. When it dies, another is started.
func (d *crew) start(extra ...string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.startLocked(extra)
}

func (d *crew) startLocked(extra []string) error {
	p, err := spawn.Start(d.ctx, d, append(d.args[:len(d.args):len(d.args)], extra...)...)
	if err != nil {
		return err
	}
	d.workers = append(d.workers, p)
	d.wg.Go(func() {
		<-p.Done()
		d.died(p)
	})
	return nil
}

// died replaces a worker, unless all is over.
func (d *crew) died(p *spawn.Process) {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := p.Err()
	if err == nil || d.stopping || d.ctx.Err() != nil {
		return
	}
	if d.replaced++; d.replaced > maxReplacements {
		d.fail(fmt.Errorf("workers keep dying; the last one: %w", err))
		return
	}
	d.say("process %d died (%v); starting another\n", p.PID(), err)
	if err := d.startLocked(nil); err != nil {
		d.fail(err)
	}
}

// killOne kills the worker that was started last, as kill -9 does.
func (d *crew) killOne() {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.workers[len(d.workers)-1]
	d.say("killing process %d with signal 9\n", p.PID())
	go p.Kill() // it waits for the end, which died has to be told of
}

// over says that training is, so that workers which find nobody to work for are no news.
func (d *crew) over() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopping = true
}

// Write takes the workers' complaints, as their standard error.
func (d *crew) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopping || d.ctx.Err() != nil {
		return len(p), nil
	}
	return d.stderr.Write(p)
}

// wait waits until all workers have ended by themselves: the server has seen them leave.
func (d *crew) wait() {
	d.mu.Lock()
	workers := d.workers
	d.mu.Unlock()
	for _, p := range workers {
		p.Wait()
	}
	d.wg.Wait()
}

// stop ends all workers. Stopping twice, or after wait, does nothing.
func (d *crew) stop() {
	d.mu.Lock()
	d.stopping = true
	workers := d.workers
	d.mu.Unlock()
	for _, p := range workers {
		p.Stop()
	}
	d.wg.Wait()
}
