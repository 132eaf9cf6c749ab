//go:build linux

package main

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// socketEnv holds, for the role of go test's -exec program, where the relay listens.
const socketEnv = "RINGSIDE_SOFT_ROCE_SOCKET"

// placeEnv tells commands where they run: "vm" or "native".
const placeEnv = "RINGSIDE_SOFT_ROCE"

// own are the variables that a command does not get: those of this program, and the one that asks for its test, which
// would start a machine in the machine.
func own(variable string) bool {
	name, _, _ := strings.Cut(variable, "=")
	return name == socketEnv || name == placeEnv || name == "RINGSIDE_VM"
}

// commandEnv is the environment for a command.
func commandEnv(env []string, place string) []string {
	var out []string
	for _, e := range env {
		// go test's folder is shared with the host, and so holds no FIFOs and sockets: what tests make is better in the machine's memory.
		if !own(e) && !(place == "vm" && strings.HasPrefix(e, "GOTMPDIR=")) {
			out = append(out, e)
		}
	}
	return append(out, placeEnv+"="+place)
}

// runClient has the relay at socket run a command in the machine, as if it ran here: same folder, environment, input,
// output and signals. It returns the command's exit status.
func runClient(socket string, argv []string) int {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, forwarded...)
	defer signal.Stop(signals)
	dir, err := os.Getwd()
	var status exitStatus
	if err == nil {
		c := client{
			execRequest: execRequest{argv: argv, env: commandEnv(os.Environ(), "vm"), dir: dir, merge: sameFile(os.Stdout, os.Stderr)},
			stdin:       os.Stdin, stdout: os.Stdout, stderr: os.Stderr, signals: signals,
		}
		status, err = c.run(socket)
	}
	if err != nil {
		status = exitStatus{failure, err.Error()}
	}
	if status.message != "" {
		fmt.Fprintln(os.Stderr, "soft-roce:", status.message)
	}
	return int(status.code)
}

// A client has one command run in the machine.
type client struct {
	execRequest
	stdin          io.Reader
	stdout, stderr io.Writer
	signals        <-chan os.Signal
}

func (c *client) run(socket string) (exitStatus, error) {
	conn, err := dialUnix(socket)
	if err != nil {
		return exitStatus{}, fmt.Errorf("the machine is not there any more: %w", err)
	}
	defer conn.Close()
	out := &frameWriter{w: conn}
	sendErr := out.send(kindExec, 0, c.encode()) // who does not listen may have said why
	taken, done := make(chan struct{}, 1), make(chan struct{})
	defer close(done)
	go sendInput(out, c.stdin, taken, done)
	go sendSignals(out, c.signals, done)
	in := bufio.NewReaderSize(conn, 64<<10)
	for {
		f, err := readFrame(in)
		if err != nil {
			return exitStatus{}, fmt.Errorf("the machine is gone: %w", cmp.Or(sendErr, err))
		}
		switch f.kind {
		case kindStdout:
			_, err = c.stdout.Write(f.payload)
		case kindStderr:
			_, err = c.stderr.Write(f.payload)
		case kindTaken:
			select {
			case taken <- struct{}{}:
			default:
			}
		case kindStatus:
			return decodeExitStatus(f.payload)
		}
		if err != nil { // where the command would have got SIGPIPE; now it is killed, as we are gone
			return exitStatus{}, fmt.Errorf("the command's output: %w", err)
		}
	}
}

// forwarded are the signals that are the command's to deal with. go test sends SIGQUIT to a test that takes too long.
var forwarded = []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP}

func sendSignals(out *frameWriter, signals <-chan os.Signal, done <-chan struct{}) {
	for {
		select {
		case s := <-signals:
			if n, ok := s.(syscall.Signal); ok {
				_ = out.send(kindSignal, 0, []byte{byte(n)}) // a machine that is gone is noticed elsewhere
			}
		case <-done:
			return
		}
	}
}

// sendInput sends in to the command, a piece at a time: the next when the last has been taken.
func sendInput(out *frameWriter, in io.Reader, taken, done <-chan struct{}) {
	buf := make([]byte, 32<<10)
	for {
		n, err := in.Read(buf)
		if n > 0 {
			if out.send(kindStdin, 0, buf[:n]) != nil {
				return
			}
			select {
			case <-taken:
			case <-done:
				return
			}
		}
		if err != nil {
			_ = out.send(kindStdin, 0, nil)
			return
		}
	}
}

// sameFile is whether two descriptors lead to one pipe, terminal or file.
func sameFile(a, b *os.File) bool {
	var sa, sb unix.Stat_t
	if unix.Fstat(int(a.Fd()), &sa) != nil || unix.Fstat(int(b.Fd()), &sb) != nil {
		return false
	}
	return sa.Dev == sb.Dev && sa.Ino == sb.Ino
}
