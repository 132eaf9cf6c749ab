// Command ringside looks at RDMA devices and measures them.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"

	"github.com/ringside-rdma/ringside/internal/conformance"
	"github.com/ringside-rdma/ringside/internal/perf"
	"github.com/spf13/cobra"
)

func main() {
	launcherMain()
	conformance.ServePeer() // of doctor's self-test
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run is main with its surroundings as arguments. It returns the exit status: 0, 1 for a failure, 2 for a mistake in the
// arguments, 130 if the user interrupted a command that then had nothing to show.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	// The first interrupt ends a measurement early, with its results; a second one ends the program at once.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	defer context.AfterFunc(ctx, stop)()

	root := newRoot()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	var u *usageError
	var e *exitError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		fmt.Fprintln(stderr, "ringside: interrupted")
		return 130
	case errors.As(err, &u):
		fmt.Fprintf(stderr, "ringside: %v\nRun `%s --help` for what there is.\n", err, u.command)
		return 2
	}
	fmt.Fprintf(stderr, "ringside: %v\n", err)
	if errors.As(err, &e) {
		return e.status
	}
	return 1
}

// An exitError is a failure with an exit status of its own.
type exitError struct {
	status int
	err    error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// A usageError is a mistake in the arguments rather than a failure.
type usageError struct {
	command string // whose help to read
	err     error
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// usage marks err, unless it is nil, as a mistake in the arguments of cmd.
func usage(cmd *cobra.Command, err error) error {
	if err == nil {
		return nil
	}
	return &usageError{command: cmd.CommandPath(), err: err}
}

// args makes violations of a rule for positional arguments usage errors, with a sentence of what is wanted.
func args(rule cobra.PositionalArgs, want string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, a []string) error {
		if rule(cmd, a) != nil {
			return usage(cmd, fmt.Errorf("%s: %d arguments given, wanted %s", cmd.CommandPath(), len(a), want))
		}
		return nil
	}
}

// subcommand is the Args and RunE of a command that only has subcommands.
func subcommand(cmd *cobra.Command, a []string) error {
	if len(a) == 0 {
		return cmd.Help()
	}
	cmd.SuggestionsMinimumDistance = 2
	err := fmt.Errorf("%s has no command %q", cmd.CommandPath(), a[0])
	if s := cmd.SuggestionsFor(a[0]); len(s) > 0 {
		err = fmt.Errorf("%w: did you mean %q?", err, s[0])
	}
	return usage(cmd, err)
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "ringside",
		Short: "Look at RDMA devices, measure them, and see what they do",
		Long: `ringside looks at RDMA devices and measures them: those of the kernel, and the
software NIC that is part of this program and needs neither hardware nor rights.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.ArbitraryArgs,
		RunE:          subcommand,
	}
	root.SetFlagErrorFunc(usage)
	root.AddCommand(newCapture(), newDevices(), newDoctor(), newEmulate(), newPerf(), newStats(), newVersion())
	return root
}

// outputFlag adds -o, which takes text or json.
func outputFlag(cmd *cobra.Command) *string {
	v := &choiceValue{v: "text", all: []string{"text", "json"}}
	cmd.Flags().VarP(v, "output", "o", "output form: text or json")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(v.all, cobra.ShellCompDirectiveNoFileComp))
	return &v.v
}

// pathFlag adds --path, which takes a way for software NICs to meet.
func pathFlag(cmd *cobra.Command) *choiceValue {
	v := &choiceValue{v: perf.PathAuto.String(), all: []string{"auto", "memory", "udp", "tcp"}}
	cmd.Flags().Var(v, "path", "how software NICs meet: auto (memory on one host, else udp), memory, udp or tcp")
	_ = cmd.RegisterFlagCompletionFunc("path", cobra.FixedCompletions(v.all, cobra.ShellCompDirectiveNoFileComp))
	return v
}

// choiceValue is a flag that takes one of a few words.
type choiceValue struct {
	v   string
	all []string
}

func (c *choiceValue) String() string { return c.v }
func (c *choiceValue) Type() string   { return "word" }
func (c *choiceValue) Set(s string) error {
	for _, w := range c.all {
		if w == s {
			c.v = s
			return nil
		}
	}
	return fmt.Errorf("use one of %v", c.all)
}
