// Interop talks RDMA with programs that were not written here. It has two parts:
//
//   - rc, uc, ud and srq are the examples ibv_rc_pingpong, ibv_uc_pingpong, ibv_ud_pingpong and ibv_srq_pingpong of
//     rdma-core, in both roles, over ringside's public packages: the same options, the same words over TCP, the same
//     messages. Either side can be the C program.
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

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
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
		newPingPong(srq, "RC over one shared receive queue"), newIntegrity())
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
	return cmd
}

// deviceFlags adds the flags that all commands have. Their letters are those of rdma-core's examples.
func deviceFlags(cmd *cobra.Command, port *int, device *string, ibPort *uint8, gidIndex *int, events *bool) {
	f := cmd.Flags()
	f.IntVarP(port, "port", "p", *port, "TCP port to listen on or to connect to")
	f.StringVarP(device, "ib-dev", "d", "", "RDMA device; default the best that there is")
	f.Uint8VarP(ibPort, "ib-port", "i", *ibPort, "port of the device")
	f.IntVarP(gidIndex, "gid-idx", "g", *gidIndex, "slot of the port's GID table; needed except on InfiniBand")
	f.BoolVarP(events, "events", "e", false, "sleep until a completion event instead of polling")
}

// usable returns why options that both kinds of run have cannot be used, or nil.
func usable(port int, ibPort uint8) error {
	switch {
	case port < 0 || port > 65535:
		return fmt.Errorf("TCP port %d: there are 1 to 65535", port)
	case ibPort == 0:
		return errors.New("ports of a device count from 1")
	}
	return nil
}
