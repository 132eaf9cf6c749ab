package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/ringside-rdma/ringside/internal/pcap"
	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/verbs/ib"
	"github.com/spf13/cobra"
)

// captureFlags are what `ringside capture` is told.
type captureFlags struct {
	file      string
	size      byteSize
	files     int
	count     uint64
	snap      byteSize
	ring      byteSize
	pids      []int
	gids      []string
	qps       []string
	peers     []string
	opcodes   []string
	keepPorts bool
}

func newCapture() *cobra.Command {
	f := &captureFlags{snap: observe.MaxData, ring: 16 << 20}
	cmd := &cobra.Command{
		Use:   "capture [flags] [-- PROGRAM [ARGUMENT...]]",
		Short: "Show or write the packets of software NICs",
		Long: `capture shows the packets of the software NICs of your processes, one a line, or
writes them to a file that Wireshark reads (pcapng). The processes need no
preparation. Operations through memory appear as the RoCEv2 packets that they
would have been on a network. docs/capture.md says what can be seen, and how.

With a program, that is run, and its NICs (and those of its children) are
captured from their first packet on. Otherwise all NICs of this user in this
network namespace are, until the command is interrupted. A NIC whose packets
come faster than they are written loses some: they are counted.`,
		Example: `  ringside capture
  ringside capture -w trace.pcapng -- ./bin/pingpong
  ringside capture -w ring.pcapng -C 10M -W 5 --opcode write --qp 18
  ringside capture -w - | tshark -r -`,
		Args: cobra.ArbitraryArgs,
	}
	fl := cmd.Flags()
	fl.StringVarP(&f.file, "write", "w", "", "write packets to this file, - for standard output")
	fl.VarP(&f.size, "file-size", "C", "begin another file after so many bytes, with k, M or G")
	fl.IntVarP(&f.files, "files", "W", 0, "write over the oldest of so many files; needs -C")
	fl.Uint64VarP(&f.count, "count", "c", 0, "end after so many packets")
	fl.VarP(&f.snap, "snaplen", "s", "keep so many bytes of each packet, from the BTH on")
	fl.VarP(&f.ring, "buffer-size", "B", "room for packets between each NIC and this command, bytes with k, M or G")
	fl.IntSliceVar(&f.pids, "pid", nil, "only NICs of these processes")
	fl.StringSliceVar(&f.gids, "gid", nil, "only these NICs")
	fl.StringSliceVar(&f.qps, "qp", nil, "only packets from or to these queue pairs")
	fl.StringSliceVar(&f.peers, "peer", nil, "only packets from or to these addresses, GIDs or address:port")
	fl.StringSliceVar(&f.opcodes, "opcode", nil, "only these: "+strings.Join(observe.Operations, ", ")+", or opcodes such as rc_send_only")
	fl.BoolVar(&f.keepPorts, "keep-ports", false, "write UDP ports as they are, also where Wireshark does not know them for RoCEv2")
	cmd.RunE = func(cmd *cobra.Command, program []string) error {
		if cmd.ArgsLenAtDash() != 0 && len(program) > 0 {
			return usage(cmd, fmt.Errorf("a program to run comes after --, as in `%s -- %s`", cmd.CommandPath(), program[0]))
		}
		s, err := f.session()
		if err != nil {
			return usage(cmd, err)
		}
		return f.run(cmd, s, program)
	}
	return cmd
}

// byteSize is a flag: bytes, or thousands, millions and so on of them.
type byteSize int

func (b *byteSize) String() string { return strconv.Itoa(int(*b)) }
func (b *byteSize) Type() string   { return "size" }
func (b *byteSize) Set(s string) error {
	unit := 1
	if s != "" {
		if i := strings.IndexByte("kMG", s[len(s)-1]); i >= 0 {
			unit = []int{1 << 10, 1 << 20, 1 << 30}[i]
			s = s[:len(s)-1]
		}
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > 1<<40/unit {
		return errors.New("want a number of bytes, such as 4096, 64k or 1G")
	}
	*b = byteSize(n * unit)
	return nil
}

// session is what the flags ask for, but for where packets go.
func (f *captureFlags) session() (*observe.Session, error) {
	s := &observe.Session{Snap: int(f.snap), Ring: int(f.ring), Count: f.count}
	switch {
	case f.files != 0 && f.size == 0:
		return nil, errors.New("-W, the number of files, needs -C, their size")
	case f.files < 0:
		return nil, fmt.Errorf("-W %d: want a positive number", f.files)
	case f.size != 0 && (f.file == "" || f.file == "-"):
		return nil, errors.New("-C, the size of files, needs -w with the name of a file")
	case f.snap < 12:
		return nil, errors.New("--snaplen: a packet's BTH alone has 12 bytes")
	case f.ring > observe.MaxRing:
		return nil, errors.New("--buffer-size: at most 1G")
	}
	for _, t := range f.qps {
		n, err := strconv.ParseUint(t, 0, 32)
		if err != nil || n > uint64(ib.MaxQPN) {
			return nil, fmt.Errorf("--qp %q: want a number of 24 bits", t)
		}
		s.Filter.QPNs = append(s.Filter.QPNs, uint32(n))
	}
	for _, t := range f.peers {
		a, err := netip.ParseAddrPort(t)
		if err != nil {
			var addr netip.Addr
			if addr, err = netip.ParseAddr(t); err != nil {
				return nil, fmt.Errorf("--peer %q: want an address, a GID, or an address with a port", t)
			}
			a = netip.AddrPortFrom(addr, 0)
		}
		s.Filter.Peers = append(s.Filter.Peers, netip.AddrPortFrom(a.Addr().Unmap(), a.Port()))
	}
	for _, t := range f.opcodes {
		if err := s.Filter.AddOpcode(t); err != nil {
			return nil, fmt.Errorf("--opcode: %w", err)
		}
	}
	sel, err := selection(f.pids, f.gids)
	s.Select = sel
	return s, err
}

// selection tells which NICs --pid and --gid ask for: those that fit both, where both are given; nil: all.
func selection(pids []int, gids []string) (func(*observe.Source) bool, error) {
	var all []ib.GID
	for _, t := range gids {
		a, err := netip.ParseAddr(t)
		if err != nil || !a.Is6() {
			return nil, fmt.Errorf("--gid %q: want a GID as `ringside stats` shows it", t)
		}
		all = append(all, a.As16())
	}
	if len(pids) == 0 && len(all) == 0 {
		return nil, nil
	}
	return func(n *observe.Source) bool {
		return (len(pids) == 0 || slices.Contains(pids, n.PID)) && (len(all) == 0 || slices.Contains(all, n.GID))
	}, nil
}

func (f *captureFlags) run(cmd *cobra.Command, s *observe.Session, program []string) (err error) {
	stderr := cmd.ErrOrStderr()
	s.Warn = func(err error) { fmt.Fprintf(stderr, "ringside: %v\n", err) }
	s.Attached = func(n *observe.Source) {
		fmt.Fprintf(stderr, "capturing %s: %s, GID %v\n", n.Name(), n.Program, n.GID)
	}
	var lost uint64
	r := observe.Renderer{KeepPorts: f.keepPorts}
	if f.file == "" {
		s.Sink = &observe.TextSink{W: cmd.OutOrStdout(), Renderer: r}
	} else {
		files := &pcap.Files{Name: f.file, Size: int64(f.size), Count: f.files, App: "ringside capture", Out: cmd.OutOrStdout()}
		if err := files.Open(); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, files.Close()) }()
		s.Sink = &observe.FileSink{Files: files, Renderer: r}
	}
	s.Sink = &lossCounter{s.Sink, &lost}
	var status error
	if len(program) == 0 {
		// Who ends a capture so wants what was captured until then.
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM)
		defer stop()
		err = s.Run(ctx)
	} else {
		status, err = f.runProgram(cmd, s, program)
	}
	fmt.Fprintf(stderr, "%d packets captured, %d lost\n", s.Packets(), lost)
	return errors.Join(err, status)
}

// lossCounter adds up what NICs have lost.
type lossCounter struct {
	observe.Sink
	lost *uint64
}

// Finish implements observe.Sink.
func (l *lossCounter) Finish(n *observe.Source, lost uint64) error {
	*l.lost += lost
	return l.Sink.Finish(n, lost)
}

// runProgram runs a program and captures its NICs, until both have ended. It hands SIGTERM on to the program. status is the program's
// failure.
func (f *captureFlags) runProgram(cmd *cobra.Command, s *observe.Session, program []string) (status, err error) {
	l, err := observe.Listen()
	if err != nil {
		return nil, err
	}
	calls := make(chan *observe.Source, 16)
	go l.Take(s.Snap, s.Ring, calls, s.Warn)
	s.Calls = calls
	child := exec.Command(program[0], program[1:]...) // an interrupt reaches it by itself
	child.Env = append(os.Environ(), observe.EnvCapture+"="+l.Name)
	child.Stdin, child.Stdout, child.Stderr = cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()
	if f.file == "-" || f.file == "" { // standard output is ours
		child.Stdout = cmd.ErrOrStderr()
	}
	ends := make(chan os.Signal, 1)
	signal.Notify(ends, syscall.SIGTERM)
	defer signal.Stop(ends)
	if err := child.Start(); err != nil {
		l.Close()
		for range calls {
		}
		return nil, err
	}
	done := make(chan error, 1)
	go func() {
		err := child.Wait()
		l.Close()
		done <- err
	}()
	ctx, cancel := context.WithCancel(context.WithoutCancel(cmd.Context()))
	defer cancel()
	go func() {
		for {
			select {
			case sig := <-ends:
				if child.Process.Signal(sig) != nil {
					cancel() // it has ended, and the NICs are its children's
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	// Also after -c packets, the program goes on; and after an interrupt or SIGTERM, what it still sends is captured.
	err = s.Run(ctx)
	go func() {
		for n := range calls {
			n.Close()
		}
	}()
	if status = <-done; status != nil {
		status = fmt.Errorf("%s: %w", program[0], status)
	}
	return status, err
}
