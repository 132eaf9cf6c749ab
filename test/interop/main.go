// Interop talks RDMA with programs that were not written here. It has four parts:
//
//   - rc, uc, ud and srq are the examples ibv_rc_pingpong, ibv_uc_pingpong, ibv_ud_pingpong and ibv_srq_pingpong of
//     rdma-core, in both roles, over ringside's public packages: the same options, the same words over TCP, the same
//     messages. Either side can be the C program.
//   - rping and ucmatose are the examples of librdmacm by these names, in both roles: their options, and their messages on
//     connections that the system's connection manager makes, which is how iWARP devices are connected.
//   - perftest is ib_send_lat, ib_write_bw and their kin of perftest, in both roles, with one queue pair.
//   - integrity does random reads, writes, sends and atomics with a peer that computes the same sequence, which is this
//     program or testdata/integrity.c, and compares all memory with a model.
//
// The tests of this folder run each against the C programs, on Soft-RoCE:
//
//	go run ./test/soft-roce -- go test ./test/interop
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run is the program: its arguments without the name. It returns the exit status: 1 if the run failed, data that arrived
// wrong included.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := &cobra.Command{
		Use:           "interop",
		Short:         "Exchange messages and memory with RDMA programs in C",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(newPingPong(rc, "RC"), newPingPong(uc, "UC"), newPingPong(ud, "UD"),
		newPingPong(srq, "RC over one shared receive queue"), newRping(), newUcmatose(), newPerftest(), newIntegrity())
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintf(stderr, "interop: %v\n", err)
		return 1
	}
	return 0
}

func newPingPong(s service, what string) *cobra.Command {
	o := defaults(s)
	cmd := &cobra.Command{
		Use:   string(s) + " [SERVER]",
		Short: "As ibv_" + string(s) + "_pingpong: " + what,
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.server = args[0]
			}
			o.out = cmd.OutOrStdout()
			r, err := o.run(cmd.Context())
			if err != nil {
				return err
			}
			fmt.Fprintln(o.out, r)
			return nil
		},
	}
	f := cmd.Flags()
	deviceFlags(cmd, &o.port, &o.device, &o.ibPort, &o.gidIndex, &o.events)
	f.IntVarP(&o.size, "size", "s", o.size, "bytes of a message")
	f.IntVarP(&o.rxDepth, "rx-depth", "r", o.rxDepth, "receives to post at a time")
	f.IntVarP(&o.iters, "iters", "n", o.iters, "exchanges")
	f.Uint8VarP(&o.sl, "sl", "l", 0, "service level")
	f.BoolVarP(&o.check, "chk", "c", false, "check what is received; the client sends something else each time")
	f.IntVar(&o.fill, "fill", o.fill, "with -c, as server: what byte messages consist of, but for page starts; -1: not known")
	if s != ud {
		f.IntVarP(&o.mtu, "mtu", "m", o.mtu, "path MTU in bytes; the same on both sides")
	}
	if s == srq {
		f.IntVarP(&o.numQP, "num-qp", "q", o.numQP, "queue pairs")
	}
	return cmd
}

func newRping() *cobra.Command {
	o := rpingDefaults()
	var server, client bool
	var address string
	cmd := &cobra.Command{
		Use:   "rping {-s | -c} [-a ADDRESS]",
		Short: "As rping: the server reads and writes the client's memory",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case server && o.local != "":
				return errors.New("-I is the client's")
			case server:
				o.local = address
			case address == "":
				return errors.New("name the server with -a")
			default:
				o.remote = address
			}
			o.out = cmd.OutOrStdout()
			r, err := o.run(cmd.Context())
			if err != nil {
				return err
			}
			fmt.Fprintln(o.out, r)
			return nil
		},
	}
	f := cmd.Flags()
	cmFlags(cmd, &o.cmSide)
	f.BoolVarP(&server, "server", "s", false, "be the server")
	f.BoolVarP(&client, "client", "c", false, "be the client")
	cmd.MarkFlagsOneRequired("server", "client")
	cmd.MarkFlagsMutuallyExclusive("server", "client")
	f.StringVarP(&address, "address", "a", "", "address to listen on, default all, or the server's")
	f.StringVarP(&o.local, "source", "I", "", "address to dial from")
	f.IntVarP(&o.size, "size", "S", o.size, "bytes of a ping; of the server at least the client's")
	f.IntVarP(&o.count, "count", "C", o.count, "pings; 0: for ever, or as server any number")
	f.BoolVarP(&o.validate, "validate", "V", false, "compare what arrives, also as server")
	f.BoolVarP(&o.verbose, "verbose", "v", false, "print what arrives")
	return cmd
}

func newUcmatose() *cobra.Command {
	o := ucmatoseDefaults()
	cmd := &cobra.Command{
		Use:   "ucmatose [-s SERVER]",
		Short: "As ucmatose: messages on several connections",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := o.run(cmd.Context())
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), r)
			return nil
		},
	}
	f := cmd.Flags()
	cmFlags(cmd, &o.cmSide)
	f.StringVarP(&o.remote, "server", "s", "", "address of the server; without it, be the server")
	f.StringVarP(&o.local, "bind", "b", "", "address to listen on, default all, or to dial from")
	f.IntVarP(&o.connections, "connections", "c", o.connections, "connections; the same on both sides")
	f.IntVarP(&o.count, "count", "C", o.count, "messages on each connection; the same on both sides")
	f.IntVarP(&o.size, "size", "S", o.size, "bytes of a message; the same on both sides")
	f.BoolVar(&o.numbered, "numbered", false, "as client: the server is this program, whose messages differ from each other")
	return cmd
}

// cmFlags adds the flags that both examples of librdmacm have. The device has no letter: theirs find it by the address.
func cmFlags(cmd *cobra.Command, o *cmSide) {
	f := cmd.Flags()
	f.IntVarP(&o.port, "port", "p", o.port, "port to listen on, 0 for any, or to dial")
	f.StringVar(&o.device, "ib-dev", "", "RDMA device, which must be the address's; default the best that there is")
	f.BoolVarP(&o.events, "events", "e", false, "sleep until a completion event instead of polling")
}

func newPerftest() *cobra.Command {
	cmd := &cobra.Command{Use: "perftest", Short: "As perftest's ib_send_lat and its kin"}
	for _, program := range perftestPrograms {
		cmd.AddCommand(newPerftestProgram(program))
	}
	return cmd
}

func newPerftestProgram(program string) *cobra.Command {
	o := perftestDefaults(program)
	typ := "RC"
	cmd := &cobra.Command{
		Use:   program + " [SERVER]",
		Short: "As ib_" + program,
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.server = args[0]
			}
			var ok bool
			if o.typ, ok = map[string]ib.QPType{"RC": ib.RC, "UC": ib.UC, "UD": ib.UD}[typ]; !ok {
				return fmt.Errorf("connection %q: there are RC, UC and UD", typ)
			}
			r, err := o.run(cmd.Context())
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), r)
			return nil
		},
	}
	f := cmd.Flags()
	deviceFlags(cmd, &o.port, &o.device, &o.ibPort, &o.gid, &o.events)
	f.StringVar(&typ, "connection", typ, "RC, UC or UD; the same on both sides, as are size and iters")
	f.IntVarP(&o.size, "size", "s", o.size, "bytes of a message")
	f.IntVarP(&o.iters, "iters", "n", o.iters, "messages")
	f.IntVarP(&o.mtu, "mtu", "m", o.mtu, "path MTU in bytes, default the port's; the smaller one counts")
	f.IntVarP(&o.txDepth, "tx-depth", "t", o.txDepth, "requests in flight")
	f.IntVarP(&o.rxDepth, "rx-depth", "r", o.rxDepth, "receives to post at a time")
	f.IntVarP(&o.reads, "outs", "o", o.reads, "RDMA READs and atomics in flight that the peer may have")
	f.BoolVarP(&o.check, "chk", "c", false, "compare what comes with what perftest fills its memory with")
	return cmd
}

func newIntegrity() *cobra.Command {
	o := integrityDefaults()
	cmd := &cobra.Command{
		Use:   "integrity [SERVER]",
		Short: "Compare memory with a model while both sides change it one-sided and by messages",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.server = args[0]
			}
			r, err := o.run(cmd.Context())
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), r)
			return nil
		},
	}
	f := cmd.Flags()
	deviceFlags(cmd, &o.port, &o.device, &o.ibPort, &o.gidIndex, &o.events)
	f.IntVarP(&o.mtu, "mtu", "m", o.mtu, "path MTU in bytes; the client's counts")
	f.Uint64Var(&o.seed, "seed", o.seed, "what the sequence is made from; the client's counts")
	f.IntVar(&o.rounds, "rounds", o.rounds, "rounds of up to 8 operations from each side; the client's count")
	f.BoolVar(&o.lostResults, "lost-results", false, "put up with atomics that complete without their result, as between two rxe")
	return cmd
}

// deviceFlags adds the flags of the commands whose peers meet over TCP. Their letters are those of rdma-core's examples.
func deviceFlags(cmd *cobra.Command, port *int, device *string, ibPort *uint8, gidIndex *int, events *bool) {
	f := cmd.Flags()
	f.IntVarP(port, "port", "p", *port, "TCP port to listen on or to connect to")
	f.StringVarP(device, "ib-dev", "d", "", "RDMA device; default the best that there is")
	f.Uint8VarP(ibPort, "ib-port", "i", *ibPort, "port of the device")
	f.IntVarP(gidIndex, "gid-idx", "g", *gidIndex, "slot of the port's GID table; needed except on InfiniBand")
	f.BoolVarP(events, "events", "e", false, "sleep until a completion event instead of polling")
}

// usable returns why options that all runs have cannot be used, or nil.
func usable(port int, ibPort uint8) error {
	switch {
	case port < 0 || port > 65535:
		return fmt.Errorf("TCP port %d: there are 1 to 65535", port)
	case ibPort == 0:
		return errors.New("ports of a device count from 1")
	}
	return nil
}
