package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/emulate"
	"github.com/ringside-rdma/ringside/internal/seccomp"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Programs of perftest and librdmacm on emulated ConnectX devices, which know nothing of it: with a software NIC of another process, and with the
// kernel's rxe.

// emulatedEnv makes this test binary what `ringside emulate` is: for the program that its arguments are, or with emulatedSelf for itself.
const (
	emulatedEnv  = "RINGSIDE_TEST_EMULATE"
	emulatedSelf = "self"
)

func init() {
	seccomp.Main()
	argv := os.Args
	switch os.Getenv(emulatedEnv) {
	case "":
		return
	case emulatedSelf:
	default:
		argv = argv[1:]
	}
	os.Unsetenv(emulatedEnv)
	s, err := emulate.Start(emulate.Config{Log: os.Stderr}, argv[0], argv)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	st, err := s.Wait()
	if err != nil || st != 0 {
		fmt.Printf("ended with %#x, %v\n", st, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// startEmulated is start on an emulated device, in a network namespace if it has a name.
func startEmulated(ctx context.Context, ended func(), namespace, name string, args ...string) (*program, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	argv := append([]string{emulatedEnv + "=1", self, name}, args...)
	if namespace != "" {
		argv = append([]string{"ip", "netns", "exec", namespace, "env"}, argv...)
		return start(ctx, ended, argv[0], argv[1:]...)
	}
	return start(ctx, ended, "env", argv...)
}

// The data of perftest's programs arrives at a software NIC and comes from there, as it does between such and rxe
// (TestSoftPerftestWithC).
func TestEmulatedPerftestOnSoftwareNIC(t *testing.T) {
	for _, name := range []string{"write_bw", "write_lat", "send_bw", "read_lat", "atomic_bw"} {
		for _, goServes := range []bool{true, false} {
			t.Run(name+"/"+role(goServes), func(t *testing.T) {
				path, err := exec.LookPath("ib_" + name)
				if err != nil {
					testutil.Skip(t, "perftest is not installed")
				}
				o := *perftestDefaults(name)
				o.typ, o.iters, o.txDepth, o.device, o.gid, o.check = ib.RC, 200, 16, "soft0", 0, true
				if o.verb != "atomic" {
					o.size = 3000
				}
				ctx, cancel := context.WithTimeout(t.Context(), 2*testutil.Patience)
				defer cancel()
				args := append([]string{"-d", "mlx5_0", "-x", "0"}, perftestArgs(o)...)
				if goServes {
					o.listener, o.port = local(t)
					args = append(args, "-p", strconv.Itoa(o.port), "127.0.0.1")
				} else {
					o.server, o.port = "127.0.0.1", freePort(t)
					args = append(args, "-p", strconv.Itoa(o.port))
				}
				p, err := startEmulated(ctx, cancel, "", path, args...)
				if err != nil {
					t.Fatal(err)
				}
				o.beforeClose = func() {
					select {
					case <-p.done:
					case <-ctx.Done():
					}
				}
				r, err := o.run(ctx)
				if err != nil {
					cancel() // the peer waits for what does not come
				}
				<-p.done
				if err != nil || p.err != nil {
					t.Fatalf("%v\nib_%s %s:\n%s", errors.Join(err, p.err), name, strings.Join(args, " "), p)
				}
				t.Log(r)
			})
		}
	}
}

// Two of perftest's programs: one on an emulated device in a network namespace, one on the kernel's rxe.
func TestEmulatedPerftestWithRXE(t *testing.T) {
	net := testutil.NewRXENet(t)
	slot, err := slotOf(net.Device, net.RXE)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ib_write_bw", "ib_send_bw", "ib_read_bw"} {
		path := found(t, name)
		for _, emulatedServes := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/emulated-serves-%t", name, emulatedServes), func(t *testing.T) {
				tolerant(t, false, func(limit time.Duration) error {
					ctx, cancel := context.WithTimeout(t.Context(), limit)
					defer cancel()
					port := freePort(t)
					args := []string{"-F", "-n", "300", "-s", "8192", "-p", strconv.Itoa(port)}
					if name == "ib_read_bw" {
						args = append(args, "-o", "16") // of rxe's 128 a ConnectX has that many
					}
					emulated := append([]string{"-d", "mlx5_0", "-x", strconv.Itoa(emulatedSlot(t, net.Namespace, net.Soft))}, args...)
					kernel := append([]string{"-d", net.Device, "-x", strconv.Itoa(slot)}, args...)
					ofEmulated := func() (*program, error) { return startEmulated(ctx, cancel, net.Namespace, path, emulated...) }
					ofKernel := func() (*program, error) { return start(ctx, cancel, path, kernel...) }
					first, second, space := ofEmulated, ofKernel, net.Namespace
					if emulatedServes {
						kernel = append(kernel, net.Soft.String())
					} else {
						emulated = append(emulated, net.RXE.String())
						first, second, space = ofKernel, ofEmulated, ""
					}
					a, err := first()
					if err != nil {
						return err
					}
					awaitListener(t, space, port)
					b, err := second()
					if err != nil {
						return err
					}
					<-a.done
					<-b.done
					if err := errors.Join(a.err, b.err); err != nil {
						return fmt.Errorf("%w\nemulated: %s %s\nrxe: %s %s\nthe server:\n%sthe client:\n%s", err, name, strings.Join(emulated, " "), name, strings.Join(kernel, " "), a, b)
					}
					return nil
				})
			})
		}
	}
}

// Two programs on emulated devices of two hosts, which meet by RoCEv2. Neither is told what packets the network has room for: it is less
// than a ConnectX has at most.
func TestEmulatedBetweenHosts(t *testing.T) {
	for _, name := range []string{"ibv_rc_pingpong", "ib_write_bw"} {
		found(t, name)
	}
	net := testutil.NewNetwork(t)
	var slots [2]string
	for i := range slots {
		slots[i] = strconv.Itoa(emulatedSlot(t, net.Namespaces[i], net.Addrs[i]))
	}
	for _, command := range []string{
		"ibv_rc_pingpong -e -n 200 -s 20000", "ibv_uc_pingpong -e -n 100 -s 5000", "ibv_ud_pingpong -e -n 100 -s 1000",
		"ib_write_bw -F -n 300 -s 8192", "ib_read_bw -F -n 300 -s 3000", "ib_send_bw -F -n 300 -s 1000 -c UD", "ib_atomic_bw -F -n 300",
	} {
		t.Run(strings.ReplaceAll(command, " ", ""), func(t *testing.T) {
			words := strings.Fields(command)
			path := found(t, words[0])
			index := "-x"
			if strings.HasPrefix(words[0], "ibv_") {
				index = "-g"
			}
			datagrams := strings.HasPrefix(command, "ibv_u") || strings.HasSuffix(command, "UD")
			tolerant(t, datagrams, func(limit time.Duration) error {
				ctx, cancel := context.WithTimeout(t.Context(), limit)
				defer cancel()
				port := freePort(t)
				var p [2]*program
				for i := range p {
					args := append(words[1:len(words):len(words)], "-d", "mlx5_0", "-p", strconv.Itoa(port), index, slots[i])
					if i == 1 {
						args = append(args, net.Addrs[0].String())
					}
					var err error
					if p[i], err = startEmulated(ctx, cancel, net.Namespaces[i], path, args...); err != nil {
						return err
					}
					if i == 0 {
						awaitListener(t, net.Namespaces[0], port)
					}
				}
				<-p[0].done
				<-p[1].done
				if err := errors.Join(p[0].err, p[1].err); err != nil {
					return fmt.Errorf("%w\nthe server:\n%sthe client:\n%s", err, p[0], p[1])
				}
				return nil
			})
		})
	}
}

// A program that is killed since time was up says so, by which a lost datagram is told from what fails; one that is killed since its peer has
// failed does not.
func TestProgramsThatAreKilled(t *testing.T) {
	for _, why := range []error{context.DeadlineExceeded, context.Canceled} {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		p, err := start(endsWith{ctx, why}, func() {}, "sleep", "600")
		if err != nil {
			t.Fatal(err)
		}
		cancel()
		<-p.done
		if p.err == nil || errors.Is(p.err, context.DeadlineExceeded) != (why == context.DeadlineExceeded) {
			t.Errorf("%v: the program's error is %v", why, p.err)
		}
	}
}

// endsWith ends when the context in it does, for another reason.
type endsWith struct {
	context.Context
	why error
}

func (c endsWith) Err() error {
	if c.Context.Err() == nil {
		return nil
	}
	return c.why
}

// nobodyListens is what the C programs say of a request that was rejected since its service is unknown (IBA 12.6.7.2, reason 8).
var nobodyListens = regexp.MustCompile(`EVENT_REJECTED, error:? 8\b`)

// inTurn runs a C server and its C client, and returns what failed. When a server listens can't be seen from outside: where the client was too
// early, perhaps with some of its connections only, both are run again, with more time between them.
func inTurn(t *testing.T, server, client func(ctx context.Context, ended func()) (*program, error)) error {
	for lead := 200 * time.Millisecond; ; lead *= 2 {
		err := func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 2*testutil.Patience)
			defer cancel()
			s, err := server(ctx, func() {})
			if err != nil {
				return err
			}
			time.Sleep(lead)
			c, err := client(ctx, cancel) // the server waits for what does not come
			if err != nil {
				return err
			}
			_, clientErr := finished(c)
			_, serverErr := finished(s)
			return errors.Join(wrapped("client", clientErr), wrapped("server", serverErr))
		}()
		if err == nil || !nobodyListens.MatchString(err.Error()) || lead > testutil.Patience/4 {
			return err
		}
		t.Logf("%v after the server was started, nobody listened", lead)
	}
}

// Programs of librdmacm on an emulated device, with such on an emulated device of another host, and with this program there, on one, too,
// or on the software NIC, which has a connection manager of its own.
func TestEmulatedCMBetweenHosts(t *testing.T) {
	n := testutil.NewNetwork(t)
	addrs := [2]string{n.Addrs[0].String(), n.Addrs[1].String()}
	for _, r := range softRuns {
		name := found(t, r.Name)
		for _, sides := range [][2]string{{"c", "c"}, {"c", "mlx5_0"}, {"mlx5_0", "c"}, {"c", "soft0"}, {"soft0", "c"}} { // the server's, the client's
			t.Run(fmt.Sprintf("%v/%s-%s", &r, sides[0], sides[1]), func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 2*testutil.Patience)
				defer cancel()
				port := freePort(t)
				if sides == [2]string{"c", "c"} {
					side := func(i int, remote string) func(context.Context, func()) (*program, error) {
						return func(ctx context.Context, ended func()) (*program, error) {
							return startEmulated(ctx, ended, n.Namespaces[i], name, r.args(addrs[i], remote, port)...)
						}
					}
					if err := inTurn(t, side(0, ""), side(1, addrs[0])); err != nil {
						t.Error(err)
					}
					return
				}
				var wait [2]func() error
				for i, side := range sides {
					remote := ""
					if i == 1 {
						remote = addrs[0]
					}
					switch r.Device = side; side {
					case "c":
						p, err := startEmulated(ctx, cancel, n.Namespaces[i], name, r.args(addrs[i], remote, port)...)
						if err != nil {
							t.Fatal(err)
						}
						wait[i] = func() error {
							_, err := finished(p)
							return err
						}
					case "soft0":
						wait[i] = r.child(t, n.Namespaces[i], "", addrs[i], remote, port).Wait
					default:
						wait[i] = r.child(t, n.Namespaces[i], emulatedEnv+"="+emulatedSelf, addrs[i], remote, port).Wait
					}
				}
				err := wait[1]()
				if err != nil {
					cancel() // the server waits for what does not come
				}
				if err := errors.Join(wrapped("client", err), wrapped("server", wait[0]())); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// The same programs: on an emulated device in a network namespace, and on the kernel's rxe.
func TestEmulatedCMWithRXE(t *testing.T) {
	n := testutil.NewRXENet(t)
	emulated, rxe := n.Soft.String(), n.RXE.String()
	seen := map[string]bool{}
	for _, r := range softRuns {
		if testing.Short() && seen[r.Name] { // one of each program
			continue
		}
		seen[r.Name] = true
		name := found(t, r.Name)
		for _, emulatedServes := range []bool{true, false} {
			t.Run(fmt.Sprintf("%v/emulated-serves-%t", &r, emulatedServes), func(t *testing.T) {
				port := freePort(t)
				of := func(emulator bool, remote string) func(context.Context, func()) (*program, error) {
					return func(ctx context.Context, ended func()) (*program, error) {
						if emulator {
							return startEmulated(ctx, ended, n.Namespace, name, r.args(emulated, remote, port)...)
						}
						return start(ctx, ended, name, r.args(rxe, remote, port)...)
					}
				}
				at := rxe // the server's
				if emulatedServes {
					at = emulated
				}
				if err := inTurn(t, of(emulatedServes, ""), of(!emulatedServes, at)); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// awaitListener waits until somebody listens on a TCP port in a namespace, which connecting would keep a server busy with.
func awaitListener(t *testing.T, namespace string, port int) {
	t.Helper()
	args := []string{"cat", "/proc/net/tcp", "/proc/net/tcp6"}
	if namespace != "" {
		args = append([]string{"ip", "netns", "exec", namespace}, args...)
	}
	const listening = "0A"
	testutil.Eventually(t, fmt.Sprintf("somebody listens on port %d", port), func() bool {
		out, _ := exec.Command(args[0], args[1:]...).Output()
		for line := range strings.Lines(string(out)) {
			if f := strings.Fields(line); len(f) > 3 && f[3] == listening && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) {
				return true
			}
		}
		return false
	})
}

// emulatedSlot is the slot of an address of a namespace in the GID table of an emulated device there.
func emulatedSlot(t *testing.T, namespace string, addr netip.Addr) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
	defer cancel()
	p, err := startEmulated(ctx, cancel, namespace, "/bin/sh", "-c", "for i in 0 1 2 3 4 5; do echo $i:$(cat /sys/class/infiniband/mlx5_0/ports/1/gids/$i); done")
	if err != nil {
		t.Fatal(err)
	}
	<-p.done
	b := addr.As16()
	want := ""
	for i := 0; i < 16; i += 2 {
		want += fmt.Sprintf(":%02x%02x", b[i], b[i+1])
	}
	for line := range strings.Lines(p.String()) {
		if slot, gid, _ := strings.Cut(strings.TrimSpace(line), ":"); gid == want[1:] {
			if n, err := strconv.Atoi(slot); err == nil {
				return n
			}
		}
	}
	t.Fatalf("%v is not among the GIDs of the emulated device: %v\n%s", addr, p.err, p)
	return 0
}
