package transport_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
)

func init() {
	testutil.RegisterChild("dialler", diallerChild)
}

// diallerChild dials args[0], and waits for the connection's end, or its own.
func diallerChild(args []string) {
	c, err := transport.Dial(context.Background(), args[0], &transport.Config{Device: transporttest.Device, HandshakeTimeout: testutil.Patience})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	<-c.Done()
}

// Frames of the handshake, see docs/protocol.md.
const (
	helloFrame  = 1
	acceptFrame = 2
	readyFrame  = 3
)

// gate lets one bootstrap connection to addr through. Each frame, whichever side it is from, is shown to see before it is passed on,
// unless that says that it is not to be, which ends the connection. It returns the address to dial.
func gate(t *testing.T, addr func() string, see func(kind byte) (pass bool)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	go func() {
		defer close(done)
		near, err := l.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("tcp", addr())
		if err != nil {
			near.Close()
			t.Error(err)
			return
		}
		pass := func(to, from net.Conn) {
			defer to.Close()
			defer from.Close()
			for {
				frame := make([]byte, 12)
				if _, err := io.ReadFull(from, frame); err != nil {
					return
				}
				frame = append(frame, make([]byte, binary.LittleEndian.Uint32(frame[8:]))...)
				if _, err := io.ReadFull(from, frame[12:]); err != nil || !see(frame[6]) {
					return
				}
				if _, err := to.Write(frame); err != nil {
					return
				}
			}
		}
		answers := make(chan struct{})
		go func() {
			defer close(answers)
			pass(near, far)
		}()
		pass(far, near)
		<-answers
	}()
	return l.Addr().String()
}

// TestPeerKilledInHandshake kills the peer at each frame of the handshake, before it is passed on or when it has come. The other side's
// call ends, or its connection does, with the reason; nothing is left, and others are not affected.
func TestPeerKilledInHandshake(t *testing.T) {
	paths := allPaths(t)
	transporttest.Pair(t, nil) // makes what the process keeps
	for _, path := range paths {
		if path == transport.PathTCP { // has another connection, that the gate knows nothing of
			continue
		}
		for name, frame := range map[string]byte{"hello": helloFrame, "accept": acceptFrame, "ready": readyFrame} {
			for _, passed := range []bool{false, true} {
				for _, who := range []string{"dialler", "listener"} {
					if who == "dialler" && frame == acceptFrame && passed {
						continue // to nobody
					}
					t.Run(fmt.Sprintf("%s/%s at %s, passed=%t", path, who, name, passed), func(t *testing.T) {
						testutil.CheckLeaks(t)
						t.Setenv("RINGSIDE_PATH", string(path))
						ctx := patience(t)
						p, err := transport.NewPoller(transporttest.Context(t), nil)
						if err != nil {
							t.Fatal(err)
						}
						cfg := &transport.Config{Poller: p, HandshakeTimeout: testutil.Patience}
						l, err := transport.Listen(ctx, "127.0.0.1:0", cfg)
						if err != nil {
							t.Fatal(err)
						}
						var child *testutil.Child
						see := func(kind byte) bool {
							if kind != frame {
								return true
							}
							child.Kill()
							return passed
						}
						var c *transport.Conn
						if who == "dialler" {
							started := make(chan struct{})
							at := gate(t, func() string { <-started; return l.Addr().String() }, see)
							child = testutil.StartChild(t, "dialler", at)
							close(started)
							if frame == readyFrame && passed {
								if c, err = l.Accept(ctx); err != nil {
									t.Fatal(err)
								}
							} else {
								child.Wait()
							}
						} else {
							child = testutil.StartChild(t, "echo", transport.Adaptive.String())
							addr := strings.TrimSpace(strings.TrimPrefix(child.Expect("listening "), "listening "))
							c, err = transport.Dial(ctx, gate(t, func() string { return addr }, see), cfg)
							if err != nil && ctx.Err() != nil {
								t.Errorf("Dial: %v", err)
							}
						}
						if c != nil {
							select {
							case <-c.Done():
							case <-ctx.Done():
								t.Error("the connection has not ended")
							}
							var ce *transport.CloseError
							if err := c.Err(); !errors.As(err, &ce) || !errors.Is(err, transport.ErrPeerDied) || ce.Reason == "" {
								t.Errorf("the connection ended with %v", err)
							}
							if err := c.Close(); err != nil {
								t.Error(err)
							}
						}
						a, b := transporttest.Connect(t, l, &transport.Config{Device: transporttest.Device})
						if err := a.Send(ctx, []byte("others")); err != nil {
							t.Error(err)
						}
						if err := b.Recv(ctx, func(m *transport.Message) error {
							if !bytes.Equal(m.Bytes(), []byte("others")) {
								return errors.New("differs")
							}
							return nil
						}); err != nil {
							t.Error(err)
						}
						for _, f := range []io.Closer{a, b, l, p} {
							if err := f.Close(); err != nil {
								t.Errorf("%T: %v", f, err)
							}
						}
					})
				}
			}
		}
	}
}
