package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs"
)

// connsArgs says how many connections, each with an RC queue pair, to hold open between two processes. They are shared
// out over pollers with at most connsPerPoller each: a shared receive queue holds 32,768 receives at most, and flow
// control that never runs into a full receiver keeps some for each connection.
type connsArgs struct {
	Addrs []string // one a poller
	Count int
}

const connsPerPoller = 1000

func (a *connsArgs) pollers() int { return (a.Count + connsPerPoller - 1) / connsPerPoller }

type connsResult struct {
	OpenSeconds, MessageSeconds, CloseSeconds float64
	Before, Idle                              memory // of the client
}

// memory is what a process holds, in bytes. Shared pages count in proportion, so that the sum over the processes is
// what the machine has given.
type memory struct{ PSS int64 }

// settledMemory is measured after a collection that gives unused memory back.
func settledMemory() (memory, error) {
	debug.FreeOSMemory()
	var m memory
	f, err := os.Open("/proc/self/smaps_rollup")
	if err != nil {
		return m, err
	}
	defer f.Close()
	in := bufio.NewScanner(f)
	for in.Scan() {
		if rest, ok := strings.CutPrefix(in.Text(), "Pss:"); ok {
			kb, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 10, 64)
			if err != nil {
				return m, err
			}
			m.PSS = kb << 10
		}
	}
	return m, in.Err()
}

// raiseFileLimit lets the process hold as many descriptors as it may: a connection keeps its bootstrap socket.
func raiseFileLimit(need int) error {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return err
	}
	l.Cur = l.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return err
	}
	if l.Cur < uint64(need) {
		return fmt.Errorf("%w: the limit of open files is %d, and %d are needed: raise it with ulimit -Hn", errSkipped, l.Cur, need)
	}
	return nil
}

// connsConfig makes a poller with a shared receive queue, which all connections made with the result share.
func connsConfig(device *verbs.Context) (*transport.Config, error) {
	p, err := transport.NewPoller(device, &transport.PollerConfig{SharedDepth: 1 << 15})
	return &transport.Config{Poller: p, SharedReceive: true}, err
}

// echoBack answers each message with itself.
type echoBack struct{}

func (echoBack) HandleMessage(c *transport.Conn, m *transport.Message) {
	b, err := c.TryAlloc(len(m.Bytes()))
	if err != nil {
		c.Abort(err) // one message at a time always has room
		return
	}
	copy(b.Bytes(), m.Bytes())
	c.Post(b, len(m.Bytes()))
}

func (echoBack) HandleClose(*transport.Conn, error) {}

func connsServer(raw json.RawMessage) error {
	var a connsArgs
	if err := json.Unmarshal(raw, &a); err != nil {
		return err
	}
	ctx := context.Background()
	device, err := verbs.Open("soft0")
	if err != nil {
		return err
	}
	for range a.pollers() {
		cfg, err := connsConfig(device)
		if err != nil {
			return err
		}
		l, err := transport.Listen(ctx, "127.0.0.1:0", cfg)
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept(ctx)
				if err != nil {
					return
				}
				c.SetHandler(echoBack{})
			}
		}()
		a.Addrs = append(a.Addrs, l.Addr().String())
	}
	say("addrs", a.Addrs)
	for line := range childStdin {
		if line == "memory" {
			m, err := settledMemory()
			if err != nil {
				return err
			}
			say("memory", m)
		}
	}
	return nil // the process ends: the client has closed its connections
}

func connsClient(raw json.RawMessage) error {
	var a connsArgs
	if err := json.Unmarshal(raw, &a); err != nil {
		return err
	}
	ctx := context.Background()
	device, err := verbs.Open("soft0")
	if err != nil {
		return err
	}
	var cfgs []*transport.Config
	for _, addr := range a.Addrs {
		cfg, err := connsConfig(device)
		if err != nil {
			return err
		}
		first, err := transport.Dial(ctx, addr, cfg) // what comes with a poller's first connection belongs to none of them
		if err != nil {
			return err
		}
		defer first.Close()
		cfgs = append(cfgs, cfg)
	}
	var r connsResult
	if r.Before, err = settledMemory(); err != nil {
		return err
	}
	say("before", true)
	hear("go")

	conns := make([]*transport.Conn, a.Count)
	begin := time.Now()
	for i := range conns {
		if conns[i], err = transport.Dial(ctx, a.Addrs[i%len(cfgs)], cfgs[i%len(cfgs)]); err != nil {
			return fmt.Errorf("connection %d of %d: %w", i+1, a.Count, err)
		}
	}
	r.OpenSeconds = time.Since(begin).Seconds()

	begin = time.Now()
	message := make([]byte, 64)
	for i, c := range conns {
		binary.LittleEndian.PutUint64(message, uint64(i))
		if err := c.Send(ctx, message); err != nil {
			return fmt.Errorf("message on connection %d: %w", i+1, err)
		}
		err := c.Recv(ctx, func(m *transport.Message) error {
			if !bytes.Equal(m.Bytes(), message) {
				return fmt.Errorf("the echo differs from the message")
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("echo on connection %d: %w", i+1, err)
		}
	}
	r.MessageSeconds = time.Since(begin).Seconds()

	if r.Idle, err = settledMemory(); err != nil {
		return err
	}
	say("idle", true)
	hear("close")
	begin = time.Now()
	for i, c := range conns {
		if err := c.Close(); err != nil {
			return fmt.Errorf("closing connection %d: %w", i+1, err)
		}
	}
	r.CloseSeconds = time.Since(begin).Seconds()
	say("result", r)
	return nil
}

type connsTest struct{ full, quick int }

func (t connsTest) run(c *config) (values, error) {
	n := c.scale(t.full, t.quick)
	if err := raiseFileLimit(n + n/2); err != nil {
		return nil, err
	}
	const patience = 5 * time.Minute
	server, err := start("conns-server", connsArgs{Count: n})
	if err != nil {
		return nil, err
	}
	defer server.stop()
	a := connsArgs{Count: n}
	if err := server.expect("addrs", &a.Addrs, patience); err != nil {
		return nil, err
	}
	client, err := start("conns-client", a)
	if err != nil {
		return nil, err
	}
	defer client.stop()
	var ok bool
	var before, idle memory
	var r connsResult
	for _, step := range []func() error{
		func() error { return client.expect("before", &ok, patience) },
		func() error { return server.tell("memory") },
		func() error { return server.expect("memory", &before, patience) },
		func() error { return client.tell("go") },
		func() error { return client.expect("idle", &ok, patience) },
		func() error { return server.tell("memory") },
		func() error { return server.expect("memory", &idle, patience) },
		func() error { return client.tell("close") },
		func() error { return client.expect("result", &r, patience) },
	} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	perConn := func(after, before int64) float64 { return float64(after-before) / float64(n) / 1024 }
	return values{
		"count":         float64(n),
		"open_us":       r.OpenSeconds * 1e6 / float64(n),
		"echo_us":       r.MessageSeconds * 1e6 / float64(n),
		"close_us":      r.CloseSeconds * 1e6 / float64(n),
		"client_kib":    perConn(r.Idle.PSS, r.Before.PSS),
		"server_kib":    perConn(idle.PSS, before.PSS),
		"idle_conn_kib": perConn(r.Idle.PSS+idle.PSS, r.Before.PSS+before.PSS),
	}, nil
}
