package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The software NIC against the kernel's rxe: this side of a run is in a process of its own, in the network namespace at the other
// end of the veth pair. One process makes all the runs of a test, one after the other, each with a NIC of its own.

func init() { testutil.RegisterChild("interop-runs", serveRuns) }

// An order asks the process for one run. Each becomes the options of what it names.
type order struct {
	What   string // rc, uc, ud, srq, integrity, or one of perftestPrograms
	Server string // where the C program serves; empty: be the server
	Port   int    // ... and its TCP port
	Limit  time.Duration

	Size, MTU, RxDepth, Iters, NumQP, Fill int
	Events                                 bool
	Seed                                   uint64
	Type                                   ib.QPType // of perftest
	TxDepth                                int       // ... and this
}

// What the process answers, a line each: the TCP port that it listens on, that it is done but still answers the peer, and how it
// ended.
const (
	sayPort  = "port "
	sayHolds = "holds"
	sayEnded = "ended " // what the run returned, quoted
	sayError = "error " // the same of an error
)

// serveRuns is the process. Its argument is the address of this end; its input are orders, and after each one line: wordRelease
// once the peer needs no answers any more, or wordCancel.
func serveRuns(args []string) {
	addr := netip.MustParseAddr(args[0])
	gid, err := slotOf("soft0", addr)
	if err != nil {
		fmt.Println(sayError + strconv.Quote(err.Error()))
		return
	}
	for line := range testutil.ChildInput() {
		var o order
		if err := json.Unmarshal([]byte(line), &o); err != nil {
			fmt.Println(sayError + strconv.Quote(err.Error()))
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), o.Limit)
		released := make(chan struct{})
		go func() {
			defer close(released)
			if <-testutil.ChildInput() == wordCancel {
				cancel()
			}
		}()
		r, err := o.run(ctx, addr, gid, func() {
			fmt.Println(sayHolds)
			select {
			case <-released:
			case <-ctx.Done():
			}
		})
		if err == nil {
			fmt.Println(sayEnded + strconv.Quote(r.String()))
		} else {
			fmt.Println(sayError + strconv.Quote(err.Error()))
		}
		<-released
		cancel()
	}
}

const (
	wordRelease = "release"
	wordCancel  = "cancel"
)

// slotOf returns the slot of an address in a device's GID table.
func slotOf(device string, addr netip.Addr) (int, error) {
	dev, err := verbs.Open(device)
	if err != nil {
		return 0, err
	}
	defer dev.Close()
	gids, err := dev.GIDs(1)
	if err != nil {
		return 0, err
	}
	for _, g := range gids {
		if g.GID == addr.As16() {
			return g.Index, nil
		}
	}
	return 0, fmt.Errorf("%s has no GID %v: %v", device, addr, gids)
}

// run does what the order says; wait is as in pingPong.
func (o *order) run(ctx context.Context, addr netip.Addr, gid int, wait func()) (fmt.Stringer, error) {
	var l net.Listener
	if o.Server == "" {
		var err error
		if l, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String()); err != nil {
			return nil, err
		}
		fmt.Println(sayPort + strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
	}
	if p := perftestDefaults(o.What); p != nil {
		p.device, p.gid, p.listener, p.server, p.port, p.beforeClose = "soft0", gid, l, o.Server, o.Port, wait
		p.typ, p.size, p.iters, p.txDepth, p.events, p.check = o.Type, o.Size, o.Iters, o.TxDepth, o.Events, true
		return p.run(ctx)
	}
	switch o.What {
	case "integrity":
		i := integrityDefaults()
		i.device, i.gidIndex, i.listener, i.server, i.port = "soft0", gid, l, o.Server, o.Port
		i.events, i.seed, i.rounds, i.mtu = o.Events, o.Seed, o.Iters, o.MTU
		r, err := i.run(ctx)
		if err == nil {
			wait()
		}
		return r, err
	default:
		p := defaults(service(o.What))
		p.device, p.gidIndex, p.listener, p.server, p.port, p.beforeClose = "soft0", gid, l, o.Server, o.Port, wait
		p.size, p.mtu, p.rxDepth, p.iters, p.numQP = o.Size, o.MTU, o.RxDepth, o.Iters, o.NumQP
		p.fill, p.events, p.check = o.Fill, o.Events, true
		return p.run(ctx)
	}
}

// A softPeer is the process, and the network between it and rxe.
type softPeer struct {
	*testutil.RXENet
	child *testutil.Child
	slot  int // of rxe's address
}

func newSoftPeer(t *testing.T, net *testutil.RXENet) *softPeer {
	p := &softPeer{RXENet: net}
	var err error
	if p.slot, err = slotOf(p.Device, p.RXE); err != nil {
		t.Fatal(err)
	}
	p.child = testutil.StartChildIn(t, p.Namespace, nil, "interop-runs", p.Soft.String())
	return p
}

// meet makes one run with a C program, and returns what went wrong on either side. args are the program's, less device, GID
// (whose flag is gidFlag), port and server.
func (p *softPeer) meet(t *testing.T, o order, goServes bool, limit time.Duration, program, gidFlag string, args []string) error {
	t.Helper()
	limit = min(limit, testutil.Patience*4/5) // the process says that time is up before this side stops waiting for a line
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	o.Limit = limit
	port := freePort(t)
	if !goServes {
		o.Server, o.Port = p.RXE.String(), port
	}
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	p.child.Send(string(b))
	args = append([]string{"-d", p.Device, gidFlag, strconv.Itoa(p.slot)}, args...)
	if goServes {
		line := p.child.Line()
		said, ok := strings.CutPrefix(line, sayPort)
		if !ok {
			p.child.Send(wordCancel)
			return errors.New(line)
		}
		args = append(args, "-p", said, p.Soft.String())
	} else {
		args = append(args, "-p", strconv.Itoa(port))
	}
	c, err := start(ctx, cancel, program, args...)
	if err != nil {
		t.Fatal(err)
	}
	told := context.AfterFunc(ctx, func() { p.child.Send(wordCancel) })
	ours, ourErr := "", error(nil)
	for ended := false; !ended; {
		line := p.child.Line()
		word, said, _ := strings.Cut(line, " ")
		switch word + " " {
		case sayHolds + " ":
			<-c.done
			if told() {
				p.child.Send(wordRelease)
			}
		case sayEnded, sayError:
			ended = true
			if ours, err = strconv.Unquote(said); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			if word+" " == sayError {
				ourErr = errors.New(ours)
				cancel() // the peer waits for what does not come
			}
		default:
			t.Fatalf("the process said %q", line)
		}
	}
	<-c.done
	if ourErr == nil && c.err == nil {
		t.Log(ours)
		return nil
	}
	// Whichever side sees first that time is up: the other is then cancelled.
	if ctx.Err() == context.DeadlineExceeded || bytes.Contains([]byte(ours), []byte(context.DeadlineExceeded.Error())) {
		ourErr = fmt.Errorf("%w: %s", context.DeadlineExceeded, ours)
	}
	return fmt.Errorf("%w\n%s %s:\n%s", errors.Join(ourErr, c.err), filepath.Base(program), strings.Join(args, " "), c)
}

// found returns where a program is.
func found(t *testing.T, program string) string {
	t.Helper()
	name, err := exec.LookPath(program)
	if err != nil {
		missing(t, "%v", err)
	}
	return name
}

// Messages between the software NIC and ibv_rc_pingpong and its kin on rxe.
func TestSoftPingPongWithC(t *testing.T) {
	p := newSoftPeer(t, testutil.NewRXENet(t))
	defer p.Sniff(t).Check()
	eachRun(t, func(t *testing.T, o pingPong) {
		shortly(t, o)
		p.pingPong(t, o, true, false)
	})
}

// Two of these over IPv6: a connection and datagrams, whose receives begin with the header.
func TestSoftPingPongWithCOverIPv6(t *testing.T) {
	p := newSoftPeer(t, testutil.NewRXENet(t).OverIPv6())
	defer p.Sniff(t).Check()
	for _, s := range []service{rc, ud} {
		t.Run(string(s), func(t *testing.T) {
			o := defaults(s)
			o.size, o.check, o.iters = 1500, true, 60
			p.pingPong(t, o, true) // the C programs serve over IPv4 only
		})
	}
}

// pingPong makes a run in each of the roles.
func (p *softPeer) pingPong(t *testing.T, o pingPong, roles ...bool) {
	name := found(t, "ibv_"+string(o.service)+"_pingpong")
	if o.service == srq && o.size > 4096 {
		// The C program destroys its queue pairs once it has seen enough, and answers nothing after that. Fewer large messages
		// at once are no more than either side can hold while an emulated machine is at something else.
		o.numQP = 4
	}
	for _, goServes := range roles {
		t.Run(role(goServes), func(t *testing.T) {
			order := order{What: string(o.service), Size: o.size, MTU: o.mtu, RxDepth: o.rxDepth, Iters: o.iters, NumQP: o.numQP,
				Fill: fillOfC(o.service), Events: o.events}
			tolerant(t, o.service == uc || o.service == ud, func(limit time.Duration) error {
				return p.meet(t, order, goServes, limit, name, "-g", pingPongArgs(o))
			})
		})
	}
}

// The random sequence of reads, writes, sends and atomics between the software NIC and a C program on rxe, as
// TestIntegrityWithC.
func TestSoftIntegrityWithC(t *testing.T) {
	p := newSoftPeer(t, testutil.NewRXENet(t))
	defer p.Sniff(t).Check()
	name := compiled(t)
	random := uint64(time.Now().UnixNano()) // told in the log
	for _, goServes := range []bool{true, false} {
		for i, seed := range []uint64{1, 2, random} {
			if testing.Short() && i == 0 {
				continue
			}
			t.Run(fmt.Sprintf("%s/%d", role(goServes), i+1), func(t *testing.T) {
				t.Logf("seed %#x", seed)
				o := order{What: "integrity", Iters: integrityRounds, MTU: 512, Seed: seed, Events: i == 1}
				var args []string
				if goServes { // the client's count
					args = []string{"-m", "4096", "-n", strconv.Itoa(integrityRounds), "-s", strconv.FormatUint(seed, 10)}
				}
				if o.Events {
					args = append(args, "-e")
				}
				if err := p.meet(t, o, goServes, 2*testutil.Patience, name, "-g", args); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

// perftestArgs are the arguments of the C program that the same options give.
func perftestArgs(o perftest) []string {
	args := []string{"-F", "-n", strconv.Itoa(o.iters), "-c", o.typ.String()} // -F: whatever the processor's frequency does
	if o.verb != "atomic" {
		args = append(args, "-s", strconv.Itoa(o.size))
	}
	if o.bw {
		args = append(args, "-t", strconv.Itoa(o.txDepth))
	}
	return args
}

// The software NIC and perftest on rxe. What the C programs send, and what they let be read, is compared with what they have in
// their memory; they themselves compare nothing. They always poll: with events, theirs hang (they take one completion for each
// event, of whichever queue it is). With -short, one size with each program, and only RC in both roles.
func TestSoftPerftestWithC(t *testing.T) {
	p := newSoftPeer(t, testutil.NewRXENet(t))
	defer p.Sniff(t).Check()
	eachPerftest(t, func(t *testing.T, o perftest) {
		if testing.Short() && (o.size != 1500 && o.verb != "atomic" || o.events != (o.typ == ib.UC && o.program() != "write_lat")) {
			t.Skip("left out by -short")
		}
		name := found(t, "ib_"+o.program())
		for _, goServes := range []bool{true, false} {
			if testing.Short() && o.typ != ib.RC && goServes != o.bw {
				continue
			}
			t.Run(role(goServes), func(t *testing.T) {
				order := order{What: o.program(), Type: o.typ, Size: o.size, Iters: o.iters, TxDepth: o.txDepth, Events: o.events}
				tolerant(t, o.typ != ib.RC, func(limit time.Duration) error {
					return p.meet(t, order, goServes, limit, name, "-x", perftestArgs(o))
				})
			})
		}
	})
}
